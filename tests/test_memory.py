"""How much memory there is: the machine's, and the container's."""

from pathlib import Path

import psutil
import pytest

from structconv_cli.data.memory import available_memory

MIB = 2**20
VERSIONS = {
    "2": ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    "1": (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_container_has_what_its_limit_leaves(version: str, tmp_path: Path) -> None:
    limit, use, statistics, cached = VERSIONS[version]
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text(f"{64 * MIB}\n")
    (tmp_path / use).write_text(f"{40 * MIB}\n")
    # Cached files are given back when memory is asked for.
    (tmp_path / statistics).write_text(f"anon {30 * MIB}\n{cached} {10 * MIB}\n")
    assert available_memory(tmp_path) == 34 * MIB
    (tmp_path / limit).write_text("max\n")
    assert available_memory(tmp_path) > 34 * MIB


def test_without_a_container_it_is_the_machines(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
