"""The table of measured configs: one JSON file per SM class, and the C++ rows made from all of them.

    tuning/sm_90.json ─┐
                       ├── inc_text ──► include/mbq/tuning.inc     {MBQ_W3A16, MBQ_F16, 90, 18944, 3584, 1, 1, 17},
    tuning/sm_89.json ─┘

An entry says which config id runs M from ``m_lo`` to ``m_hi`` of one linear. Linears without an entry take the rule of
``select.h``. With no JSON file the C++ table is empty: nothing here was guessed.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mbq_export.errors import FormatError
from mbq_kernels.library import DTYPE_IDS, SCHEME_IDS

SCHEMA: Final = "mbq-export/kernel-tuning@1"
FOLDER: Final = Path(__file__).resolve().parents[1] / "tuning"
LEAST_GAIN_PERCENT: Final = 2.0
ENDLESS: Final = 1 << 30
"""``m_hi`` of the last bucket."""
BUCKETS: Final = (
    (1, 1),
    (2, 2),
    (3, 4),
    (5, 8),
    (9, 16),
    (17, 32),
    (33, 64),
    (65, 128),
    (129, 256),
    (257, 512),
    (513, 1024),
    (1025, 2048),
    (2049, ENDLESS),
)
"""M from and to, both included. A config is timed at the largest M of its bucket, the last one at 4096."""
LARGEST_TIMED: Final = 4096
ENTRY_KEYS: Final = frozenset(
    {"scheme", "dtype", "group_size", "n", "k", "m_lo", "m_hi", "config", "median_us"}
    | {"rule_config", "gain_percent", "spread_percent"}
)
SCHEME_NAMES: Final = {name: f"MBQ_{name.upper()}" for name in SCHEME_IDS}
DTYPE_NAMES: Final = {"float16": "MBQ_F16", "bfloat16": "MBQ_BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One config that was timed.

    Attributes:
        config: Its id.
        median_us: Median time of a launch.
        spread_percent: (p90 - p10) / median.
    """

    config: int
    median_us: float
    spread_percent: float


def choose(candidates: Iterable[Candidate], *, current: int) -> tuple[Candidate, float]:
    """Pick the config of an entry.

    The current one stays unless another gains more than `LEAST_GAIN_PERCENT` and more than either spread: a table
    that changes with the noise of a day cannot be reviewed.

    Args:
        candidates: All that were timed, the current one among them.
        current: Config in use so far.

    Returns:
        The config to use, and its gain over the current one in percent, 0 if that stays.
    """
    timed = {candidate.config: candidate for candidate in candidates}
    held = timed[current]
    best = min(timed.values(), key=lambda c: (c.median_us, c.config))
    gain = 100 * (held.median_us / best.median_us - 1)
    needed = max(LEAST_GAIN_PERCENT, held.spread_percent, best.spread_percent)
    return (best, gain) if gain > needed else (held, 0.0)


def bucket_rows(bucket: tuple[int, int]) -> int:
    """M at which a bucket is timed."""
    return min(bucket[1], LARGEST_TIMED)


def key_of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an entry is for; at most one entry of a file has it."""
    return tuple(entry[name] for name in ("scheme", "dtype", "group_size", "n", "k", "m_lo"))


def read_tables(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Read and check every table of a folder, by SM.

    Raises:
        FormatError: E4102 for a file that is no table.
    """
    files = sorted(folder.glob("sm_*.json"), key=lambda path: int(path.stem.removeprefix("sm_")))
    return [check_table(json.loads(path.read_text()), name=path.name) for path in files]


def check_table(document: Any, *, name: str) -> dict[str, Any]:
    """Check a table against its schema.

    Raises:
        FormatError: E4102 with the first thing that is wrong.
    """
    wrong = _wrong_table(document, name)
    if wrong:
        raise FormatError(
            "E4102",
            f"{name} is no table of configs: {wrong}.",
            why=f"a table has the schema {SCHEMA}",
            fix="python kernels/bench.py tune",
        )
    checked: dict[str, Any] = document
    return checked


def _wrong_table(document: Any, name: str) -> str:
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        return "another schema"
    missing = {"sm", "device", "clocks", "versions", "entries"} - document.keys()
    if missing:
        return f"no {', '.join(sorted(missing))}"
    if name != f"sm_{document['sm']}.json":
        return f"its SM is {document['sm']}"
    entries = document["entries"]
    wrong = next((text for text in map(_wrong_entry, entries) if text), "")
    if wrong:
        return wrong
    keys = [key_of(entry) for entry in entries]
    if keys != sorted(set(keys)):
        return "entries are not sorted, or one comes twice"
    return ""


def _wrong_entry(entry: Mapping[str, Any]) -> str:
    if set(entry) != ENTRY_KEYS:
        return f"an entry has the keys {', '.join(sorted(entry))}"
    if entry["scheme"] not in SCHEME_IDS or entry["dtype"] not in DTYPE_IDS:
        return f"{entry['scheme']} in {entry['dtype']} is not known"
    sizes = [entry[name] for name in ("n", "k", "m_lo", "m_hi", "config", "rule_config")]
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        return "a size or config id is no whole number"
    if (entry["m_lo"], entry["m_hi"]) not in BUCKETS:
        return f"M {entry['m_lo']} to {entry['m_hi']} is no bucket"
    return ""


def inc_text(tables: Iterable[Mapping[str, Any]]) -> str:
    """Rows of ``tuning.inc``: scheme, dtype, sm, n, k, first and last M, config id.

    Group size is no part of the key: the choice depends on bytes and shape, which groups hardly change; of several the
    default group's entry, the largest, is taken.
    """
    rows: dict[tuple[Any, ...], str] = {}
    for table in tables:
        for entry in sorted(table["entries"], key=lambda e: -e["group_size"]):
            key = (table["sm"], *(entry[n] for n in ("scheme", "dtype", "n", "k", "m_lo")))
            rows.setdefault(
                key,
                f"{{{SCHEME_NAMES[entry['scheme']]}, {DTYPE_NAMES[entry['dtype']]}, {table['sm']}, "
                f"{entry['n']}, {entry['k']}, {entry['m_lo']}, {entry['m_hi']}, {entry['config']}}},",
            )
    head = (
        "// Measured configs, made from kernels/mbq_kernels/tuning/*.json by `python kernels/bench.py table`.\n"
        "// scheme, dtype, sm, n, k, first M, last M, config id\n"
    )
    return head + "".join(f"{rows[key]}\n" for key in sorted(rows))
