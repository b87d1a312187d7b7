"""Make `sslbench/data/builtin_cifar10.npz` from a full CIFAR-10: `python tests/make_builtin.py CIFAR_DIR`.

CIFAR_DIR holds `cifar10_{train,test}.npz` as lossless WebP strips with a per-image flag `lossy` where a picture came
from a JPEG; those are left out. 400 and 100 images a class, drawn with seed 0; shuffled, so that any prefix is mixed.
"""

import io
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

OUT = Path(__file__).parent.parent / "sslbench" / "data" / "builtin_cifar10.npz"


def main(source: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split, file, per_class in (("train", "train", 400), ("val", "test", 100)):
        z = np.load(source / f"cifar10_{file}.npz")
        arrays["classes"] = z["classes"]
        blob, offsets = z["strips"], z["offsets"]
        strips = [np.asarray(Image.open(io.BytesIO(blob[a:b].tobytes()))) for a, b in pairwise(offsets)]
        images = np.concatenate([s.reshape(-1, 32, 32, 3) for s in strips])
        labels = np.repeat(z["strip_label"], z["strip_count"]).astype(np.int64)
        usable = np.ones(len(images), bool)
        usable[z["lossy"].nonzero()[0] if z["lossy"].dtype == bool else z["lossy"]] = False
        picked = [rng.choice(np.flatnonzero(usable & (labels == k)), per_class, replace=False) for k in range(10)]
        index = rng.permutation(np.concatenate(picked))
        # Neighbours in a strip that look alike compress better, but order is part of the data: keep it mixed.
        out = []
        for i in range(0, len(index), 500):
            buffer = io.BytesIO()
            strip = images[index[i : i + 500]].reshape(-1, 32, 3)
            Image.fromarray(strip).save(buffer, "WEBP", lossless=True, quality=100, method=6)
            out.append(np.frombuffer(buffer.getvalue(), np.uint8))
        arrays[f"{split}_strips"] = np.concatenate(out)
        arrays[f"{split}_offsets"] = np.cumsum([0] + [len(s) for s in out])
        arrays[f"{split}_labels"] = labels[index].astype(np.uint8)
    np.savez(OUT, **arrays)
    print(OUT, OUT.stat().st_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
