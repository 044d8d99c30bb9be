"""The file behind the teacher's cache: bounded, shared, whole after a kill, set aside when damaged."""

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdrl_pl.teacher import store as module
from kdrl_pl.teacher.store import Store

MB = 10**6
# In another process, without the package, which takes seconds to import.
IMPORT = f"""
import sys
sys.path.insert(0, {str(Path(module.__file__).parent)!r})
from store import Store
"""


def value(number, size=1000):
    return number.to_bytes(4, "little") * (size // 4)


def filled(folder, numbers=range(5), max_bytes=100 * MB):
    store = Store(folder, max_bytes)
    store.put({key(n): value(n) for n in numbers})
    return store


def key(number):
    return number.to_bytes(16, "big")


def test_what_was_put_is_found_by_another_process(tmp_path):
    filled(tmp_path)
    code = f"""{IMPORT}
found = Store({str(tmp_path)!r}, 10**8).get([n.to_bytes(16, "big") for n in range(7)])
print(sorted((int.from_bytes(key, "big"), value[0], len(value)) for key, value in found.items()))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str([(n, n, 1000) for n in range(5)])


def test_the_first_value_of_a_key_stays_and_is_returned(tmp_path):
    store = filled(tmp_path)
    assert store.put({key(3): b"late", key(9): b"new!"}) == {key(3): value(3), key(9): b"new!"}
    assert store.get([key(3), key(9), key(10)]) == {key(3): value(3), key(9): b"new!"}


def test_more_keys_than_a_query_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 3)
    store = filled(tmp_path, range(10))
    assert store.get([key(n) for n in range(12)]) == {key(n): value(n) for n in range(10)}


def test_the_file_is_bounded_and_the_oldest_go(tmp_path):
    store = Store(tmp_path, 2 * MB)
    for start in range(0, 200, 10):  # 8 MB in all
        store.put({key(n): value(n, 40_000) for n in range(start, start + 10)})
    store.close()
    found = sorted(int.from_bytes(k, "big") for k in store.get([key(n) for n in range(200)]))
    assert found == list(range(200 - len(found), 200))
    assert 30 <= len(found) <= 50  # 2 MB hold 50 values of 40 kB
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    store.close()
    assert (tmp_path / "rows-0.sqlite").stat().st_size <= 2.1 * MB, size


def test_values_larger_than_the_file_cost_nothing_but_themselves(tmp_path):
    store = filled(tmp_path, range(5), 100_000)
    given = {key(50): value(50, 400_000)}
    assert store.put(given) == given
    assert store.get([key(50)]) in ({}, given)
    store.put({key(60): value(60)})
    assert store.get([key(60)]) == {key(60): value(60)}


@pytest.mark.parametrize("damage", ["header", "middle", "value", "cut"])
def test_a_damaged_file_is_set_aside_and_said(damage, tmp_path, caplog):
    filled(tmp_path, range(200)).close()
    path = tmp_path / "rows-0.sqlite"
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[:100] = b"no database".ljust(100)
    elif damage == "middle":
        content[4096 : len(content)] = b"\xff" * (len(content) - 4096)
    elif damage == "value":
        place = content.index(value(7, 100))
        content[place] ^= 1
    else:
        content = content[: len(content) // 2]
    path.write_bytes(content)
    store = Store(tmp_path, 100 * MB)
    with caplog.at_level(logging.WARNING, "kdrl_pl"):
        assert store.get([key(n) for n in range(200)]) == {}
        assert store.put({key(1): b"once more"}) == {key(1): b"once more"}
    (record,) = [r for r in caplog.records if "damaged" in r.getMessage()]
    assert f"{path} is damaged" in record.getMessage()
    assert "it is now rows-0.sqlite.damaged, and an empty one follows" in record.getMessage()
    assert (tmp_path / "rows-0.sqlite.damaged").read_bytes()[:5000] == bytes(content)[:5000]
    assert Store(tmp_path, 100 * MB).get([key(1)]) == {key(1): b"once more"}  # in rows-1.sqlite


def test_a_process_that_still_has_the_damaged_file_open_cannot_harm_the_new_one(tmp_path):
    first, second = filled(tmp_path, range(200)), Store(tmp_path, 100 * MB)
    assert second.get([key(3)])
    second._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(tmp_path / "rows-0.sqlite", "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 100_000)
    first.close()
    assert first.get([key(n) for n in range(200)]) == {}
    first.put({key(4): b"four"})
    second.close()  # the last one to have the old file open: SQLite now removes what belongs to its name
    assert second.get([key(4)]) == first.get([key(4)]) == {key(4): b"four"}
    assert second.put({key(5): b"five"}) == first.get([key(5)]) == {key(5): b"five"}


def test_a_disk_that_takes_nothing_costs_what_is_stored_and_is_said_once(tmp_path, caplog, monkeypatch):
    store = filled(tmp_path)
    other = sqlite3.connect(tmp_path / "rows-0.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # somebody who never lets go
    store.close()
    monkeypatch.setattr(module, "WAIT", 0.05)
    with caplog.at_level(logging.WARNING, "kdrl_pl"):
        for _ in range(2):
            assert store.put({key(8): b"kept"}) == {key(8): b"kept"}
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path}: database is locked; what it does not take or give is computed"
    ]
    other.execute("COMMIT")
    assert store.get([key(8)]) == {}
    assert store.get([key(2)]) == {key(2): value(2)}


WRITER = (
    IMPORT
    + """
folder, who, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = Store(folder, 10**9)
for n in range(rounds):
    number = 10_000 * who + n
    keys = [(100 * number + i).to_bytes(16, "big") for i in range(20)]
    store.put({key: number.to_bytes(4, "little") * 5000 for key in keys})
    print(number, flush=True)
"""
)


@pytest.mark.faults
def test_a_kill_leaves_whole_transactions(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), "1", "100000"], stdout=subprocess.PIPE, text=True
    )
    told = [int(process.stdout.readline()) for _ in range(8)]
    time.sleep(0.013)
    process.send_signal(signal.SIGKILL)
    told += [int(line) for line in process.stdout.read().split()]
    process.wait()
    store = Store(tmp_path, 10**9)
    for number in range(told[0], told[-1] + 3):
        found = store.get([(100 * number + i).to_bytes(16, "big") for i in range(20)])
        assert len(found) in (0, 20)  # all of a transaction, or none
        assert len(found) == 20 or number not in told
        assert set(found.values()) <= {number.to_bytes(4, "little") * 5000}
    store.put({key(1): b"goes on"})
    assert store.get([key(1)]) == {key(1): b"goes on"}
    assert not list(tmp_path.glob("*.damaged"))


@pytest.mark.distributed
def test_processes_write_at_the_same_time(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(who), "30"], env=environment, stderr=subprocess.PIPE
        )
        for who in range(1, 4)
    ]
    errors = [process.communicate(timeout=60)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert not any("locked" in error or "damaged" in error for error in errors), errors
    store = Store(tmp_path, 10**9)
    numbers = [10_000 * who + n for who in range(1, 4) for n in range(30)]
    keys = [(100 * number + i).to_bytes(16, "big") for number in numbers for i in range(20)]
    assert len(store.get(keys)) == 3 * 30 * 20
