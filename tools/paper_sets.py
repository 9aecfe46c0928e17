"""Lay parquet files of labelled images out as published sets lie on disk, for `fedsigma bench paper`.

    python -m tools.paper_sets --data DIR --out SETS

DIR holds files with the columns image, label, split and, for some, site. Samples of five published
biomedical sets become folders with split files as their cards say. The samples are smaller than the sets, and
of two some classes are missing: `--allow-differences` takes them. The two sets of the real studies, which are
no part of the paper, get cards of their own in SETS/cards (FEDSIGMA_CARDS=SETS/cards) and a sites.csv.
Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pyarrow.parquet as pq
from rich.progress import track

from fedsigma.common.data.catalog.card import card, card_text

# File -> card -> label in the file: class on the card.
PUBLISHED = {
    "brain_mri": (
        "btmri",
        {
            "glioma": "glioma tumor",
            "meningioma": "meningioma tumor",
            "pituitary tumour": "pituitary tumor",
            "no tumour": "normal brain",
        },
    ),
    "covid_radiography": (
        "covid",
        {"COVID-19 chest X-ray": "covid lungs", "normal chest X-ray": "normal lungs"},
    ),
    "ct_kidney": (
        "ctkidney",
        {
            "kidney cyst": "cyst kidney",
            "kidney stone": "kidney stone",
            "kidney tumour": "kidney tumor",
            "normal kidney": "normal kidney",
        },
    ),
    "knee_xray": ("kneexray", {}),
    "lung_histology": (
        "lungcolon",
        {
            "lung adenocarcinoma": "lung adenocarcinoma",
            "benign lung tissue": "lung benign tissue",
            "lung squamous cell carcinoma": "lung squamous cell carcinoma",
        },
    ),
}
OWN = {"wbc_labs": "white_cells", "ham10000_sites": "dermoscopy"}


def main() -> None:
    """Write what is not there yet."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    a = p.parse_args()
    files = {file.stem: file for file in sorted(a.data.rglob("*.parquet"))}
    if not files.keys() & {*PUBLISHED, *OWN}:
        raise SystemExit(f"no {', '.join(f'{stem}.parquet' for stem in (*PUBLISHED, *OWN))} below {a.data}")
    for stem, (name, classes) in PUBLISHED.items():
        if stem in files:
            chosen = card(name)
            order = [c for c in chosen.class_names if not classes or c in classes.values()]
            lay_out(files[stem], a.out / chosen.layout.folder, chosen.layout.split, classes, order)
    for stem, name in OWN.items():
        if stem in files:
            split = f"split_{name}.json"
            order = lay_out(files[stem], a.out / name, split, {}, [])
            write_card(a.out / "cards" / f"{name}.yaml", name, split, order)


def lay_out(file: Path, folder: Path, split: str, classes: dict[str, str], order: list[str]) -> list[str]:
    """Write the images, the split file and sites.csv; returns the classes in the order of their numbers."""
    table = pq.read_table(file).to_pylist()
    labels = order or sorted({str(row["label"]) for row in table})
    rows: dict[str, list[list[object]]] = {"train": [], "val": [], "test": []}
    sites = ["path,site"]
    for place, row in enumerate(track(table, file.stem)):
        label = classes.get(row["label"], row["label"])
        suffix = "png" if row["image"]["bytes"].startswith(b"\x89PNG") else "jpg"
        path = f"{label.replace(' ', '_')}/{place:05d}.{suffix}"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / path).exists():
            (folder / path).write_bytes(row["image"]["bytes"])
        rows[row["split"]].append([path, labels.index(label), label])
        if row["site"]:
            sites.append(f"{path},{row['site']}")
    if not (folder / split).exists():
        (folder / split).write_text(json.dumps(rows))
    if len(sites) > 1 and not (folder / "sites.csv").exists():
        (folder / "sites.csv").write_text("\n".join(sites) + "\n")
    print(f"{folder}: {', '.join(f'{len(found)} {part}' for part, found in rows.items())}")
    return labels


def write_card(file: Path, name: str, split: str, classes: list[str]) -> None:
    """A card for a set that has none, with the hyper-parameters of BTMRI's."""
    text = card_text("btmri")
    protocols = text[text.index("protocols:") : text.index("archives:")]
    head = {
        "name": name,
        "title": name.replace("_", " "),
        "domain": "biomedical",
        "backbone": card("btmri").backbone,
        "classes": classes,
        "class_count": len(classes),
        "template": "a photo of a {}.",
        "page": "https://example.org",
        "licence": "unknown",
        "layout": {"kind": "split", "folder": name, "split": split},
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    counts = json.loads((file.parent.parent / name / split).read_text())
    lines.append(f"images: {json.dumps({part: len(rows) for part, rows in counts.items()})}")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_text("\n".join(lines) + "\n" + protocols)


if __name__ == "__main__":
    main()
