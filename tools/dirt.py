"""No bad image may crash the data path or be missed: index and loader over a dirty corpus.

    python -m tools.dirt FOLDER --images 5000 --clipart

makes a corpus (make_dirty_images.py), adds the public-domain part of Debian's ``openclipart-png``,
indexes everything with ``asvr data index``, passes an epoch through the training loader, and
compares the samples that were named bad with those that strict PIL or nvImageCodec reject.
"""

import argparse
import io
import json
import logging
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from nvidia import nvimgcodec
from PIL import Image

from megatron_asvr.cli.main import main as asvr
from megatron_asvr.config.load import load
from megatron_asvr.data.decode import takes_pil
from megatron_asvr.data.gate import kind_of
from megatron_asvr.data.loader import Loader
from megatron_asvr.data.text import TextTokenizer
from tools.make_dirty_images import write_corpus

PUBLIC_DOMAIN = re.compile(rb"cc:license[^>]*publicdomain", re.IGNORECASE)
SETTINGS = """
model:
  language: {vocab_size: 512, hidden_size: 32, num_heads: 4}
  vision: {image_size: 48, patch_size: 16, hidden_size: 32, num_heads: 4}
  text_tokenizer: %(folder)s/text.model
loss: {visual_weight: 0}
train: {trainable: [projector], global_batch: 64, steps: 1}
data:
  max_length: 256
  cache_dir: %(folder)s/cache
  max_bad_share: 0.5
  train: %(sources)s
"""


def clipart(folder: Path) -> Path | None:
    """The public-domain images of openclipart as links in one folder; None where apt fails."""
    unpacked, chosen = folder / "openclipart", folder / "clipart"
    if not unpacked.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        fetch = ["apt-get", "download", "openclipart-png", "openclipart-svg"]
        if subprocess.run(fetch, cwd=folder, capture_output=True, check=False).returncode:
            return None
        for package in folder.glob("openclipart-*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
            package.unlink()
    chosen.mkdir(exist_ok=True)
    root = unpacked / "usr/share/openclipart"
    for image in sorted(root.glob("png/**/*.png")):
        drawing = root / "svg" / image.relative_to(root / "png").with_suffix(".svg")
        if drawing.is_file() and PUBLIC_DOMAIN.search(drawing.read_bytes()):
            link = chosen / "_".join(image.relative_to(root / "png").parts)
            if not link.exists():
                link.hardlink_to(image.resolve())
    return chosen


class Judge:
    """What two decoders say of an image, apart from the data path."""

    def __init__(self) -> None:
        self._decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
            max_num_cpu_threads=1,
        )

    def rejects(self, encoded: bytes) -> str | None:
        """Who cannot decode an image; nvImageCodec is asked for what it is to decode."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Image.open(io.BytesIO(encoded)).load()
        except Exception:  # whatever it is, it is bad
            return "PIL"
        if takes_pil(kind_of(encoded)):
            return None
        return "nvImageCodec" if self._decoder.decode(encoded) is None else None


def check(
    folder: Path, *, images: int, seed: int = 0, pictures: Path | None = None
) -> dict[str, Any]:
    """What came of a corpus.

    Args:
        folder: where everything is written.
        images: of the generated part, 5 % of them dirt.
        seed: of that part.
        pictures: a folder with more images.
    """
    meta = write_corpus(folder / "made", images=images, dirt=0.05, seed=seed)
    texts = ["USER: What kind of file is this? ASSISTANT: jpeg png webp tiff gif avif"] * 40
    TextTokenizer.train(texts, folder / "text.model", vocab_size=300)
    sources = [{"path": str(folder / "made" / "train.json")}]
    sources += [{"path": f"{pictures}/"}] if pictures is not None else []
    settings = folder / "run.yaml"
    settings.write_text(SETTINGS % {"folder": folder, "sources": json.dumps(sources)})
    start = time.monotonic()
    if asvr(["data", "index", str(settings)]) != 0:
        raise SystemExit("asvr data index failed")
    index_s, start = time.monotonic() - start, time.monotonic()
    config = load(str(settings), [])
    text = TextTokenizer(str(config.model.text_tokenizer))
    met = 0
    with Loader(config, text, split="train", device=torch.device("cpu")) as loader:
        loader.prepare()
        named = {Path(str(bad["image"])).name: str(bad["reason"]) for bad in loader.bad_samples}
        for step in range(loader.steps):
            met += sum(len(batch.sample_ids) for batch in loader.step(step))
        report = loader.report()
    loader_s = time.monotonic() - start
    judge, files = Judge(), [folder / "made" / str(each["name"]) for each in meta]
    files += sorted(pictures.iterdir()) if pictures is not None else []
    rejected = {file.name: who for file in files if (who := judge.rejects(file.read_bytes()))}
    must = {str(each["name"]) for each in meta if each["usable"] is False} | set(rejected)
    refused = {name: why for name, why in named.items() if name not in rejected}
    return {
        "images": len(files),
        "generated": len(meta),
        "dirty": sum(each["usable"] is not True for each in meta),
        "bad": len(must),
        "rejected_by": dict(Counter(rejected.values())),
        "named": len(named),
        "missed": sorted(must - set(named)),
        "good_but_named": sorted(
            str(e["name"]) for e in meta if e["usable"] is True and str(e["name"]) in named
        ),
        "refused_by_limits_only": dict(Counter(refused)),
        "samples_met": met,
        "placeholders": report["placeholders"],
        "pil_images": report["pil_images"],
        "index_s": round(index_s, 1),
        "loader_s": round(loader_s, 1),
    }


def main() -> None:
    """Print what came of a corpus; fail where an image was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clipart", action="store_true", help="add openclipart-png (apt)")
    options = parser.parse_args()
    logging.getLogger("megatron_asvr").setLevel(logging.ERROR)
    pictures = clipart(options.folder) if options.clipart else None
    if options.clipart and pictures is None:
        print("apt-get cannot download openclipart-png; without it", file=sys.stderr)
    found = check(options.folder, images=options.images, seed=options.seed, pictures=pictures)
    print(json.dumps(found, indent=1))
    if found["missed"]:
        sys.exit(f"{len(found['missed'])} bad images were missed")


if __name__ == "__main__":
    main()
