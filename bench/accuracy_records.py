"""The result files of bench/accuracy.py: one JSON line a run, provenance first."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bench.accuracy_setting import Setting

Record = dict[str, Any]


def key(record: Record) -> str:
    """What tells one setting from another: the fields of `Setting` in a record."""
    return json.dumps({field.name: record[field.name] for field in fields(Setting)}, sort_keys=True)


def key_of(setting: Setting) -> str:
    """The key that the record of `setting` has."""
    return key(json.loads(json.dumps(asdict(setting))))


def changes(record: Record) -> Record:
    """The fields in which the setting of a record is not the plain one, but for the arm."""
    plain = json.loads(json.dumps(asdict(Setting("", 0))))
    return {name: record[name] for name, value in plain.items() if name != "arm" and record[name] != value}


def read(path: Path) -> list[Record]:
    """The records of a result file; lines of provenance, and one that a killed run left half-written, are skipped."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "accuracy" in record:
            records.append(record)
    return records


def append(path: Path, record: Record) -> None:
    """Add one line, whole or not at all as far as other processes see."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record) + "\n").encode()
    with path.open("ab") as file:
        if file.tell() and path.read_bytes()[-1:] != b"\n":
            line = b"\n" + line
        file.write(line)
