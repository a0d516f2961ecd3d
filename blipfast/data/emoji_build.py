"""Make `assets/emoji/` from the published npm packages: `python -m blipfast.data.emoji_build` (for maintainers).

Needs npm (`npm pack` fetches the packages of `SOURCES`, checked against their sha512), resvg-py 0.5.0 and Pillow 13;
`--packages DIR` takes tarballs that are already there. Vendors name their pictures by the label an emoji had when
they drew it; `name_to_emoji` maps those names to today's emoji. Skin tones, components and country flags are left
out, and so are emoji that vendors of one family only have drawn. The same inputs give the same bytes.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from blipfast.data.emoji import ASSETS, CELL, COLUMNS

TAGS = 5  # per emoji
COMPONENTS, FLAGS, FLAG = (
    2,
    9,
    97,
)  # numbers of groups and (the last) of the subgroup of flags that are no country's


@dataclass(frozen=True)
class Source:
    """A published npm package. `family` and `quality` are for vendors: lossy WebP quality, None for lossless."""

    package: str
    version: str
    sha512: str
    family: str = ""
    quality: int | None = None


NAMES = Source(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)
SOURCES = {
    "noto": Source(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        family="noto",
        quality=75,
    ),
    "noto-v1": Source(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        family="noto",
        quality=75,
    ),
    "twemoji": Source(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        family="twemoji",
    ),
    "fluent": Source(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        family="fluent",
    ),
    "emojione": Source(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        family="emojione",
        quality=75,
    ),
    "fxemoji": Source(
        "@iconify-json/fxemoji",
        "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        family="fxemoji",
        quality=75,
    ),
    "streamline": Source(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
        family="streamline",
        quality=75,
    ),
}

# Names (letters and digits only) that no label, past or present, explains; fxemoji's, mostly.
NICKNAMES = {
    "bolt": "high voltage",
    "bouquetofflowers": "bouquet",
    "bullhorn": "loudspeaker",
    "bunny": "rabbit face",
    "bunnyside": "rabbit",
    "catside": "cat",
    "cellphone": "mobile phone",
    "chilipepper": "hot pepper",
    "closedmailboxlowered": "closed mailbox with lowered flag",
    "closedmailboxraised": "closed mailbox with raised flag",
    "confetti": "confetti ball",
    "constructionsign": "construction",
    "controlknob": "control knobs",
    "crazyface": "zany face",
    "dogside": "dog",
    "dragonhead": "dragon face",
    "dragonside": "dragon",
    "evergreen": "evergreen tree",
    "fallingleaf": "fallen leaf",
    "faxicon": "fax machine",
    "fishcakeswirl": "fish cake with swirl",
    "flexbicep": "flexed biceps",
    "forkknife": "fork and knife",
    "frontfacingchick": "front-facing baby chick",
    "gamedice": "game die",
    "gma": "old woman",
    "gpa": "old man",
    "hampster": "hamster",
    "handheldvideocamera": "video camera",
    "heels": "high-heeled shoe",
    "highspeedtrainbulletnose": "bullet train",
    "japaneseangrymask": "ogre",
    "leaffluttering": "leaf fluttering in wind",
    "leopardside": "leopard",
    "makeupbag": "handbag",
    "manltepiececlock": "mantelpiece clock",
    "mansshirt": "t-shirt",
    "mensshoe": "man’s shoe",
    "mouseside": "mouse",
    "openmailboxlowered": "open mailbox with lowered flag",
    "openmailboxraised": "open mailbox with raised flag",
    "pigside": "pig",
    "pigsnout": "pig nose",
    "pinkwallet": "purse",
    "present": "wrapped gift",
    "ringingbell": "bell",
    "sandals": "woman’s sandal",
    "snowmountains": "snow-capped mountain",
    "spurtingwhale": "spouting whale",
    "stormcloud": "cloud with lightning",
    "studiomic": "studio microphone",
    "sunraincloud": "sun behind rain cloud",
    "tennisball": "tennis",
    "tigerside": "tiger",
    "toykotower": "Tokyo tower",
    "videocasette": "videocassette",
    "waningbibbousmoon": "waning gibbous moon",
    "womansshirt": "woman’s clothes",
}

# Drawings of something else than their name says: a crane is called "construction", but "bow" is no person bowing.
WRONG = {
    "fxemoji": set("bow down gamedie keyboard linkedpaperclips pout pouting tramcar up wave window".split()),
    "streamline": {"japan", "turkey"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--packages", type=Path, help="folder of the npm tarballs; default: fetch them with npm"
    )
    parser.add_argument("--output", type=Path, default=ASSETS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        build(args.packages or fetch(Path(scratch)), args.output)


def fetch(folder: Path) -> Path:
    """Download the packages into `folder` with npm (their scripts do not run)."""
    for source in (NAMES, *SOURCES.values()):
        command = ["npm", "pack", "--silent", "--ignore-scripts", f"{source.package}@{source.version}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder


def build(packages: Path, output: Path) -> None:
    """Write the sheets, emoji.jsonl, vendors.json and SHA256SUMS into `output` from the tarballs in `packages`."""
    names = open_package(packages, NAMES)
    emoji = read_emoji(names)
    sets = {vendor: open_package(packages, source) for vendor, source in SOURCES.items()}
    find = name_to_emoji(emoji, names, sets)
    drawings = {vendor: drawings_of(vendor, files, emoji, find) for vendor, files in sets.items()}

    kept = [code for code in emoji if len({SOURCES[v].family for v in drawings if code in drawings[v]}) > 1]
    output.mkdir(parents=True, exist_ok=True)
    lines, vendors = [], []
    for code in kept:
        record = emoji[code] | {"vendors": [v for v in drawings if code in drawings[v]]}
        lines.append(json.dumps(record, ensure_ascii=False))
    (output / "emoji.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for vendor, files in sets.items():
        pictures = [render(drawings[vendor][code]) for code in kept if code in drawings[vendor]]
        save_sheet(pictures, output / f"{vendor}.webp", SOURCES[vendor].quality)
        vendors.append(describe(vendor, files["info.json"], len(pictures)))
        print(f"{vendor}: {len(pictures)} pictures, {(output / f'{vendor}.webp').stat().st_size:,} bytes")
    (output / "vendors.json").write_text(
        json.dumps(vendors, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    made = sorted(path for path in output.iterdir() if path.suffix in (".webp", ".json", ".jsonl"))
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in made]
    (output / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def open_package(folder: Path, source: Source) -> dict[str, Any]:
    """The JSON files of a package by their path in it. Raises ValueError if the tarball is not the published one."""
    path = folder / f"{source.package.removeprefix('@').replace('/', '-')}-{source.version}.tgz"
    data = path.read_bytes()
    found = base64.b64encode(hashlib.sha512(data).digest()).decode()
    if found != source.sha512:
        raise ValueError(
            f"{path}: sha512 is {found}, expected {source.sha512}. Fetch it again with `npm pack`."
        )
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        wanted = [m for m in archive if re.fullmatch(r"package/(\w+\.json|(en|meta)/.*\.json)", m.name)]
        return {m.name.removeprefix("package/"): json.load(archive.extractfile(m)) for m in wanted}


def read_emoji(names: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is published of every emoji, by its code points ("1f415-200d-1f9ba"), in Unicode's order."""
    groups = names["meta/groups.json"]
    emoji = {}
    for entry in sorted(names["en/data.json"], key=lambda e: e.get("order", 0)):
        group, subgroup = entry.get("group"), entry.get("subgroup")
        if group in (None, COMPONENTS) or (group == FLAGS and subgroup != FLAG):
            continue
        emoji[bare(entry["hexcode"])] = {
            "name": entry["label"],
            "slug": slug(entry["label"]),
            "group": groups["groups"][str(group)],
            "subgroup": groups["subgroups"][str(subgroup)],
            "tags": entry.get("tags", [])[:TAGS],
        }
    return emoji


def name_to_emoji(emoji: dict, names: dict[str, Any], sets: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Code points by squeezed name: today's labels first, then older ones, Unicode's names and chat short codes."""
    find: dict[str, str] = {}

    def learn(name: str, code: str | None) -> None:
        if code in emoji:
            find.setdefault(squeeze(name), code)

    for code, entry in emoji.items():
        learn(entry["name"], code)
    for files in sets.values():
        for code, name in files["chars.json"].items():
            learn(name, bare(code))
    for files in sets.values():  # an alias is an older or newer label of the same picture
        for name, alias in files["icons.json"].get("aliases", {}).items():
            code = find.get(squeeze(alias["parent"])) or find.get(squeeze(name))
            learn(name, code)
            learn(alias["parent"], code)
    for nickname, name in NICKNAMES.items():
        learn(nickname, find[squeeze(name)])
    for code in emoji:
        characters = [chr(int(point, 16)) for point in code.split("-")]
        if len(characters) == 1:
            learn(unicodedata.name(characters[0], ""), code)
    for path in ("emojibase", "iamcal", "joypixels", "emojibase-legacy"):
        for code, words in names[f"en/shortcodes/{path}.json"].items():
            for word in [words] if isinstance(words, str) else words:
                learn(word, bare(code))
    find.pop("", None)
    return find


def drawings_of(vendor: str, files: dict[str, Any], emoji: dict, find: dict[str, str]) -> dict[str, str]:
    """A vendor's drawings as SVG by code points; the surest match wins, then the first ("ring-1" before "ring-2")."""
    icons, codes = files["icons.json"], {name: bare(code) for code, name in files["chars.json"].items()}
    labels = {squeeze(entry["name"]): code for code, entry in emoji.items()}
    meant: list[
        tuple[int, str, str]
    ] = []  # how it was found: by code point, by today's label, by anything else
    for name in icons["icons"]:
        plain = squeeze(re.sub(r"-\d$", "", name))
        ways = (codes.get(name), labels.get(plain), find.get(squeeze(name)) or find.get(plain))
        found = [(rank, name, code) for rank, code in enumerate(ways) if code in emoji]
        meant += found[:1]
    drawings: dict[str, str] = {}
    for _, name, code in sorted(meant):
        if code not in drawings and name not in WRONG.get(vendor, ()):
            icon = icons["icons"][name]
            left, top, width, height = (
                icon.get(key, icons.get(key, default))
                for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
            )
            drawings[code] = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'width="{CELL}" height="{CELL}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
            )
    return drawings


def render(svg: str) -> Image.Image:
    """An RGBA picture of CELL x CELL pixels."""
    import resvg_py  # only the tool needs it

    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def save_sheet(pictures: list[Image.Image], path: Path, quality: int | None) -> None:
    """Lay the pictures out in rows of COLUMNS and write them as one WebP, lossless if `quality` is None."""
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % COLUMNS * CELL, place // COLUMNS * CELL))
    if quality is None:
        sheet.save(path, "WEBP", lossless=True, quality=100, method=6)
    else:
        sheet.save(path, "WEBP", quality=quality, method=6)


def describe(vendor: str, info: dict[str, Any], pictures: int) -> dict[str, Any]:
    """A vendor's entry in vendors.json: who made the art and under what licence, as the package says."""
    source = SOURCES[vendor]
    return {
        "name": vendor,
        "family": source.family,
        "title": info["name"],
        "author": info["author"]["name"],
        "licence": info["license"]["spdx"],
        "url": info["author"]["url"],
        "package": source.package,
        "version": source.version,
        "pictures": pictures,
    }


def bare(code: str) -> str:
    """Code points in lower case, without the variation selector that vendors write or leave out."""
    return "-".join(point for point in code.lower().split("-") if point != "fe0f")


def squeeze(name: str) -> str:
    """Letters and digits only: what is left in common of the ways a name is written."""
    return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKD", name.lower()))


def slug(name: str) -> str:
    """A file name of a label: "woman’s boot" -> "womans-boot"."""
    spelt = name.lower().replace("#", "hash").replace("*", "asterisk")
    plain = unicodedata.normalize("NFKD", spelt).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


if __name__ == "__main__":
    main()
