"""Phones and app budgets as memory envelopes, each with where its number comes from.

``tag`` says how far a number can be trusted: ``"verified"``: read in the source; ``"unverified"``:
recalled or from hearsay, to be shown with that word or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..models import LLM
from ..runtime import InputError
from .envelope import PhoneEnvelope

__all__ = ["PHONES", "REFERENCES", "Phone"]

Number = float | int

# Parameters of the models that the papers ran on these phones, tied weights counted once: from the
# published configurations (RobertaForMaskedLM of roberta-large, OPTForCausalLM of facebook/opt-1.3b);
# MeBP's smallest by its name.
REFERENCES = {"RoBERTa-large": 355_412_057, "OPT-1.3B": 1_315_758_080, "a 0.5B model": 500_000_000}


@dataclass(frozen=True)
class Phone:
    """A phone or an app's budget on one.

    Attributes
    ----------
    limit_mb : what an app may take, megabytes (2**20 bytes).
    counts : which memory its system counts: ``"resident"`` (Android) or ``"private"`` (iOS), see
        :mod:`pllm_helpers.device.envelope`.
    tag : ``"verified"`` or ``"unverified"``, of ``limit_mb``.
    source : where the number stands.
    reference : model that was tuned on it; :meth:`scaled` keeps its relation to the limit.
    note : what to know before comparing.
    """

    name: str
    limit_mb: Number
    counts: str
    tag: str
    source: str
    reference: str
    note: str = ""

    def envelope(self, **settings: Any) -> PhoneEnvelope:
        """The limit as it is, around whatever runs. ``settings`` as in :class:`~.envelope.PhoneEnvelope`."""
        given = {"counts": self.counts, "name": self.name, **settings}
        return PhoneEnvelope(self.limit_mb, **given)

    def scaled(self, model: LLM | int, *, reference: str | int | None = None, **settings: Any) -> PhoneEnvelope:
        r"""The limit that stands to ``model`` as the phone's stands to the model that was tuned on it.

        .. math:: L' = L \cdot \frac{N_{model}}{N_{reference}}

        with N the number of parameters (tied ones once), both models in the same dtype. So weights,
        gradients and optimiser state, which are proportional to N, take the same share of the limit
        as on the phone. What does *not* scale so: activations and logits grow with batch, tokens,
        width and vocabulary (a small model spends relatively more on them), and the runtime's own
        memory is constant. So a verdict "killed" or "finished" carries over for methods whose memory
        is mostly proportional to N, and only for them.

        Parameters
        ----------
        model : an LLM, or a number of parameters.
        reference : another model to keep the relation to: a name in ``REFERENCES`` or a number.
        """
        count = model.parameters if isinstance(model, LLM) else model
        chosen = self.reference if reference is None else reference
        base = REFERENCES.get(chosen) if isinstance(chosen, str) else chosen
        if base is None:
            raise InputError("reference", f"expected one of {', '.join(REFERENCES)} or a number, got {chosen!r}")
        for what, value in (("model", count), ("reference", base)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(what, f"expected an LLM or a number of parameters, got {value!r}")
        envelope = self.envelope(**settings)
        text = f"{self.name} x {count / base:.3f} ({count / 1e6:.0f}M for {chosen})"
        return replace(envelope, limit_mb=self.limit_mb * count / base, name=text)


PHONES = {
    phone.name: phone
    for phone in (
        Phone(
            "1 GB app",
            1024,
            "resident",
            "verified",
            "MeBP (arXiv 2510.03425, section on the memory budget, as reported at eu.36kr.com/en/p/3531025816132744): "
            '"less than 1GB", which it takes from PocketLLM, as acceptable for an app; its abstract: '
            "0.5B to 4B models tuned with less than 1 GB on an iPhone 15 Pro Max",
            "a 0.5B model",
            "A budget, not a limit of a system. Compressed weights there, fp32 or bf16 here.",
        ),
        Phone(
            "OPPO Reno 6, MeZO on RoBERTa-large",
            4 * 1024,
            "resident",
            "verified",
            "PocketLLM (arXiv 2407.01031), abstract: RoBERTa-large tuned with around 4 GB",
            "RoBERTa-large",
            "What the run took, so the phone grants at least this; Adam ran out of memory on the same phone, "
            "at a batch that the abstract does not say.",
        ),
        Phone(
            "OPPO Reno 6, MeZO on OPT-1.3B",
            6.5 * 1024,
            "resident",
            "verified",
            "PocketLLM (arXiv 2407.01031), abstract: OPT-1.3B tuned with around 6.5 GB",
            "OPT-1.3B",
            "What the run took, so the phone grants at least this.",
        ),
        Phone(
            "OPPO Reno 6, all of its memory",
            12 * 1024,
            "resident",
            "unverified",
            "12 GB is recalled, not found in a source; the system and other apps take their part of it",
            "RoBERTa-large",
            "An upper bound that no app gets.",
        ),
        Phone(
            "iPhone 15 Pro Max",
            6 * 1024,
            "private",
            "verified",
            "footprint + os_proc_available_memory() = 6,442,450,944 bytes, an app's own log in Apple's developer "
            "forums, thread 854762; the phone has 8 GB (mobilesyrup.com/2023/09/13/iphone-15-pro-8gb-ram-report)",
            "a 0.5B model",
            "The phone of MeBP. One app's log, not a published limit.",
        ),
    )
}
