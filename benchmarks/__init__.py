"""Side by side with peers: same model, same data, outputs compared first, ours and theirs in turn."""
