"""Which wrong labels a run's sampling kept: known in a simulation only, where the corruption's own record is at hand."""

from __future__ import annotations

import numpy as np

from fbl_flower.balancing.state import StateStore
from fbl_flower.config import RunConfig
from fbl_flower.data.corruption import believed_labels, wrong_label_mask
from fbl_flower.data.datasets import load_parts
from fbl_flower.data.partition import partition
from fbl_flower.federation.client import state_folder


def wrong_label_shares(config: RunConfig, run: str) -> dict[str, float] | None:
    """Return the shares of wrong labels, 0 .. 1, after a run in this process; None where no label is wrong, or nobody balances.

    `kept`: among the real images that the clients' sampling kept at the end; `set-aside`: among those it did not; `held`: among all that
    these clients have. Clients that never took part, or do not balance, are left out.

    Args:
        config: The run's configuration.
        run: The run's identity, the name of its directory: the clients' memory is found by it.
    """
    if not config.data.wrong_labels:
        return None
    parts = load_parts(config.data)
    mask = wrong_label_mask(config, len(parts.private))
    owned = partition(believed_labels(config, parts).numpy(), config)
    wrong, kept = [], []
    for client, index in enumerate(owned):
        state = StateStore(state_folder(config.state_dir, run, client)).newest()
        if state is not None:
            wrong.append(mask[index])
            kept.append(state.kept.numpy())
    if not wrong:
        return None
    all_wrong, all_kept = np.concatenate(wrong), np.concatenate(kept)
    groups = {"kept": all_wrong[all_kept], "set-aside": all_wrong[~all_kept], "held": all_wrong}
    return {name: float(group.mean()) for name, group in groups.items() if len(group)}
