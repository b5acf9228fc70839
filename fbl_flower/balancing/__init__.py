"""The paper: plan, filling, sampling, replay, alignment, drop."""
