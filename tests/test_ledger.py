"""The ledger: a line is whole, is the one that was written, and an unfinished one costs no other number."""

import json
import shutil

import pytest
from test_report import fields

from sslbench import ledger
from sslbench.errors import UserError
from sslbench.files import digest
from sslbench.ledger import Record, ledger_folder
from sslbench.paths import bundled


@pytest.fixture
def path(home):
    """A file of two numbers."""
    for value in (40.0, 41.0):
        ledger.append(fields(value))
    return ledger_folder() / "ocl.jsonl"


def values():
    return [r.value for r in ledger.read()]


def test_a_number_that_was_edited_is_named_with_its_file_and_line(path, invoke):
    """invoke: from tmp_path, which is the home."""
    path.write_text(path.read_text().replace('"value":41.0', '"value":71.0'))
    done = invoke("report")
    assert done.exit_code == 2 and "ocl.jsonl, line 2" in done.stderr and "was changed" in done.stderr, done.stderr


@pytest.mark.parametrize("part", ["seed", "epochs", "weights_sha256", "commit", "wall_s"])
def test_every_field_is_under_the_id(path, part):
    lines = path.read_text().splitlines()
    line = json.loads(lines[0])
    inner = next(d for d in (line, line["pretrain"], line["code"], line["cost"]) if part in d)
    inner[part] = str(7) if part in ("weights_sha256", "commit") else 7
    path.write_text("\n".join([json.dumps(line), *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=r"ocl\.jsonl, line 1 .*id"):
        ledger.read()


def test_the_numbers_that_were_committed_verify():
    folder = bundled("results/ledger")
    lines = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(ledger.read(folder)) == len(lines) > 200


def test_a_line_of_an_earlier_version_verifies_over_the_fields_it_has(home):
    """Which had neither a pre-training's provenance nor a condition, and whole epochs in its digest."""
    old = {k: v for k, v in fields().items() if k != "condition"}
    shown = json.loads(json.dumps(old))
    shown["pretrain"]["epochs"] = 10.0
    ledger_folder().mkdir(parents=True)
    (ledger_folder() / "ocl.jsonl").write_text(json.dumps({"id": digest(old), **shown}) + "\n")
    (record,) = ledger.read()
    assert record.pretrain.epochs == 10.0 and record.pretrain.cost is None and record.head_sha256 is None


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_that_was_never_finished_blocks_no_report_and_is_set_aside_by_the_next_number(path, end):
    torn = path.read_text().splitlines()[1][:300]
    path.write_text(path.read_text() + torn + end)
    with pytest.warns(UserWarning, match="line 3 was never finished"):
        assert values() == [40, 41]
    with pytest.warns(UserWarning, match="never finished; it is set aside"):
        ledger.append(fields(42.0))
    assert values() == [40, 41, 42]
    assert path.with_suffix(".torn").read_text() == torn + "\n"


def test_a_torn_line_that_is_not_the_last_is_an_error(path):
    first, second = path.read_text().splitlines()
    path.write_text(f"{first[:200]}\n{second}\n")
    with pytest.raises(UserError, match=r"ocl\.jsonl, line 1 is not a ledger record"):
        ledger.read()


def test_what_an_editor_leaves_is_read(path):
    """A byte order mark, Windows' ends of lines, blank lines, and no newline at the end."""
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().strip().replace(b"\n", b"\r\n\r\n \r\n"))
    assert values() == [40, 41]
    ledger.append(fields(42.0))
    assert values() == [40, 41, 42] and not path.with_suffix(".torn").exists()


def test_a_name_may_hold_any_end_of_line_that_unicode_has(home, invoke):
    name = "ocl\u2028\u2029\x85\x0b\x1e"
    ledger.append(fields(dataset=name, condition={"pool": name}))
    assert [(r.dataset, r.condition) for r in ledger.read()] == [(name, {"pool": name})]
    assert invoke("report", "--format", "csv,md").exit_code == 0


def test_the_same_line_twice_is_still_found(path):
    shutil.copy(path, path.with_name("mae.jsonl"))
    with pytest.raises(UserError, match="repeats record"):
        ledger.read()
    assert Record.model_validate(json.loads(path.read_text().splitlines()[0])).value == 40
