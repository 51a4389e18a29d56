"""The explorer at size: a site of 1,000,000 rows in 5,000 concepts, how long it takes to build and to look at.

Texts are 5 to 55 words of a vocabulary of 20,000, the frequent ones as frequent as in a language; a row lies around one
of 5,000 centres, which its word favours, in 384 channels. The run's codes are those centres, so that nothing is to be
trained. The site is built in a process of its own, whose largest anonymous memory is told: what it holds itself.

The browser is a headless Chromium that opens the folder's `index.html` as a file. Time to the first view is from the
start of the navigation until the page says that its view is drawn, in a new profile each time; time to a concept is
from the change of the address to the same, for concepts drawn at random, whose files have mostly not been loaded yet.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import clvq
import numpy as np
import pyarrow as pa
import torch
from clvq.cache.extraction import Extraction, Shard
from clvq.cache.layout import ROW_COLUMNS, SiteLayout
from clvq.cache.placement import place
from clvq.cache.writer import CacheWriter
from clvq.explorer.build import ExploreConfig, explore
from clvq.progress import SILENT
from clvq.trainer.build import build
from clvq.trainer.data import Texts, text_stream
from clvq.trainer.data import statistics as site_statistics
from clvq.trainer.folder import RunConfig, take_over
from clvq.trainer.methods import method_config
from clvq.trainer.report import write_results
from common import Peak, header

WIDTH, VOCABULARY, CLASSES = 384, 20_000, 4
SITES = ("hidden.8", "hidden.12")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage")
# Notes when the page says that a view is drawn, by its own clock.
WATCH = """
window.drawn = {};
new MutationObserver(() => {
  const ready = document.documentElement.dataset.ready;
  if (ready) window.drawn[ready] = performance.now();
}).observe(document, {subtree: true, attributes: true, attributeFilter: ["data-ready"]});
"""


def vocabulary(generator: np.random.Generator) -> list[str]:
    """Words of two to ten letters."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return ["".join(generator.choice(letters, int(generator.integers(2, 11)))) for _ in range(VOCABULARY)]


def make(folder: Path, *, rows: int, codes: int) -> None:
    """The cache and the run."""
    generator = np.random.default_rng(0)
    words = vocabulary(generator)
    counts = generator.integers(5, 56, rows // 30)
    placement = place(counts, row_bytes=2 * WIDTH)
    centres = generator.normal(size=(codes, WIDTH)).astype(np.float32) * 3
    shift = generator.normal(size=(WIDTH,)).astype(np.float32)
    rarity = 1 / np.arange(1, VOCABULARY + 1)
    said: list[str] = []
    sites = {site: SiteLayout(width=WIDTH, encoding="bf16") for site in SITES}
    extraction = Extraction({"model": {"name": "synthetic"}, "rows": rows}, placement.geometry, sites, CLASSES)
    labels = generator.integers(0, CLASSES, len(counts))
    with CacheWriter(folder / "cache", extraction) as writer:
        for number in range(placement.geometry.shards):
            first, end = placement.shard_starts[number : number + 2].tolist()
            own = counts[first:end]
            total = int(own.sum())
            word = generator.choice(VOCABULARY, total, p=rarity / rarity.sum())
            code = (word * 7 + generator.integers(0, 40, total)) % codes
            lower = centres[code] + generator.normal(size=(total, WIDTH)).astype(np.float32)
            upper = np.tanh(lower) * 2 + shift
            columns = {name: np.zeros(total, dtype) for name, (dtype, _) in ROW_COLUMNS.items()}
            columns["text"][:] = np.repeat(placement.text_id[first:end], own)
            columns["subwords"][:] = 1
            row = 0
            for count in own.tolist():
                spoken = [words[one] for one in word[row : row + count].tolist()]
                lengths = np.array([len(one) for one in spoken])
                starts = np.cumsum(lengths + 1) - lengths - 1
                columns["char_start"][row : row + count] = starts
                columns["char_end"][row : row + count] = starts + lengths
                columns["position"][row : row + count] = np.arange(count)
                said.append(" ".join(spoken))
                row += count
            logits = generator.normal(size=(end - first, CLASSES)).astype(np.float32)
            writer.commit(Shard(number, {SITES[0]: lower, SITES[1]: upper}, columns, end - first, logits))
        table = {
            "text_id": pa.array(placement.text_id, pa.int64()),
            "source_row": pa.array(range(len(counts)), pa.int64()),
            "split": ["dev" if number % 10 == 0 else "train" for number in range(len(counts))],
            "text": said,
            "text_sha256": ["0" * 64] * len(counts),
            "label": pa.array(labels, pa.int32()),
            "truncated_tokens": pa.array([0] * len(counts), pa.int32()),
            "first_row": placement.first_row,
            "row_count": counts,
        }
        names = [f"class {number}" for number in range(CLASSES)]
        writer.finish(pa.table(table), class_names=names, counts={"texts": len(counts)})
    make_run(folder, centres)


def make_run(folder: Path, centres: np.ndarray) -> None:
    """A run whose codes are the centres."""
    cache = clvq.Cache(folder / "cache")
    config: Any = method_config("kmeans", lower=SITES[0], upper=SITES[1], codes=len(centres), held_out="dev")
    model: Any = build(config, d_lower=WIDTH, d_upper=WIDTH)
    texts = Texts.of(cache, config)
    found = site_statistics(cache, texts.train_rows(cache, config), SITES, progress=SILENT)
    model.place(found[SITES[0]], found[SITES[1]])
    model.quantizer.start(torch.from_numpy(centres))
    out = folder / "run"
    out.mkdir()
    held_out = tuple(np.asarray(cache.texts["text_id"])[texts.held_out].tolist())
    begun = RunConfig.begun(
        cache_id=cache.id, vectors_id=cache.manifest.vectors_id, config=config,
        d_lower=WIDTH, d_upper=WIDTH, held_out_texts=held_out,
    )  # fmt: skip
    take_over(out, begun, force=False)
    stream = text_stream(cache, config, texts.held_out)
    write_results(model, cache, config, texts, stream, out, course={}, device=torch.device("cpu"), progress=SILENT)


def built(folder: Path) -> dict[str, Any]:
    """Build the site here; what it took."""
    cache = clvq.Cache(folder / "cache")
    began = time.perf_counter()
    with Peak() as peak:
        result = explore(cache, {"run": folder / "run"}, folder / "site", ExploreConfig())
    return {
        "rows": cache.manifest.geometry.rows,
        "texts": len(cache.texts),
        "concepts": result.runs[0].concepts,
        "seconds": time.perf_counter() - began,
        "memory_mb_before": peak.base,
        "memory_mb_peak": peak.largest,
        "site_mb": result.bytes / 1e6,
        "files": result.files,
        "texts_shown": result.texts,
    }


def looked_at(folder: Path, *, concepts: int, repeats: int) -> dict[str, Any]:
    """Milliseconds to the first view and to concepts."""
    from clvq.explorer.data_files import read_script

    codes = read_script(folder / "site", "r0/overview")["code"]
    drawn = np.random.default_rng(1).permutation(codes)[:concepts].tolist()
    first, opened = [], []
    for repeat in range(repeats):
        with Browser(folder / f"profile{repeat}") as browser:
            first.append(browser.first(folder / "site"))
            if repeat == repeats - 1:
                opened = [browser.concept(code) for code in drawn]
    return {
        "first_view_ms": {"median": statistics.median(first), "max": max(first)},
        "concept_ms": {"median": statistics.median(opened), "max": max(opened), "concepts": len(opened)},
    }


class Browser:
    """A headless Chromium with a profile of its own."""

    def __init__(self, profile: Path) -> None:
        from selenium.webdriver import Chrome, ChromeOptions
        from selenium.webdriver.chrome.service import Service

        options = ChromeOptions()
        options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        self._driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self._driver.set_script_timeout(60)
        self._driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.quit()

    def _when(self, view: str) -> float:
        """The page's clock when the view was drawn."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            found = self._driver.execute_script("return (window.drawn || {})[arguments[0]]", view)
            if found is not None:
                return float(found)
            time.sleep(0.01)
        raise RuntimeError(f"{view} was not drawn: {self._driver.get_log('browser')[-3:]}")

    def first(self, site: Path) -> float:
        """Milliseconds from the navigation to the first view."""
        self._driver.get(f"{(site / 'index.html').as_uri()}#/r0")
        return self._when("overview")

    def concept(self, code: int) -> float:
        """Milliseconds from the change of the address to the concept."""
        asked = self._driver.execute_script(
            "window.drawn = {}; const now = performance.now(); location.hash = arguments[0]; return now",
            f"#/r0/c/{code}",
        )
        return self._when(f"concept:r0:{code}") - float(asked)


def main() -> None:
    """Make, build, look, tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--codes", type=int, default=5_000)
    parser.add_argument("--concepts", type=int, default=50, help="concepts to open")
    parser.add_argument("--repeats", type=int, default=5, help="first views")
    parser.add_argument("--folder", type=Path, help="keep cache, run and site here, and use those that are there")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.build is not None:
        print(json.dumps(built(given.build)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "run").exists():
            make(folder, rows=given.rows, codes=given.codes)
        shutil.rmtree(folder / "site", ignore_errors=True)
        command = [sys.executable, __file__, "--build", str(folder)]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        told |= looked_at(folder, concepts=given.concepts, repeats=given.repeats)
    head = header("torch", "scikit-learn", "selenium")
    if given.json:
        print(json.dumps({"machine": head, **told}))
        return
    print(head)
    print(f"\n{told['rows']:,} rows of {told['texts']:,} texts in {told['concepts']:,} concepts")
    print(f"  built in {told['seconds']:.0f} s; memory {told['memory_mb_peak']:.0f} MB at most, ", end="")
    print(f"{told['memory_mb_before']:.0f} MB before")
    print(f"  site {told['site_mb']:.1f} MB in {told['files']:,} files, {told['texts_shown']:,} texts can be opened")
    for name, called in (("first_view_ms", "first view"), ("concept_ms", "a concept")):
        print(f"  {called}: median {told[name]['median']:.0f} ms, at most {told[name]['max']:.0f} ms")


if __name__ == "__main__":
    main()
