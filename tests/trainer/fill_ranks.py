"""One rank of a cache that several fill: a program, started once for each rank with torchrun's variables.

fill_ranks.py CONFIG OUT: fills the cache, then reads its share of the batches and writes what it was given.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(config_path: str, out: str, steps: int) -> None:
    import torch
    from cache_kit import fill
    from xflux_trainer import cache, config
    from xflux_trainer.order import Order
    from xflux_trainer.ranks import Launch, Ranks

    torch.set_num_threads(1)
    ranks = Ranks(Launch.read(os.environ))
    ranks.join()
    run = config.load(config_path)
    entries = fill(run, ranks)
    order = Order.of(entries.buckets, run)
    told = []
    for number in range(ranks.rank, steps, ranks.world_size):
        batch = cache.read_batch([entries[pick] for pick in order[number]])
        for k, pick in enumerate(order[number]):
            told.append({
                "number": number, "pick": pick, "latents": batch.latents[k].flatten()[:64].tolist(),
                "shape": list(batch.latents[k].shape), "text": batch.text[k].float().flatten().tolist(),
                "mask": None if batch.mask is None else batch.mask[k].tolist(),
            })  # fmt: skip
    Path(out, f"rank-{ranks.rank}.json").write_text(json.dumps(told), encoding="utf-8")
    ranks.leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
