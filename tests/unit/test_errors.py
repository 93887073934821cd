"""What cannot be written is one message, told before the work where that is possible."""

import os
from pathlib import Path

import pytest

from deadpan.errors import DeadpanError, refuse_unwritable, writing


def test_a_file_is_written_into_a_folder_that_was_not_there(tmp_path: Path) -> None:
    place = tmp_path / "new" / "folder" / "figures.json"
    refuse_unwritable("figures", place)
    with writing("figures", place):
        place.write_text("{}")
    refuse_unwritable("figures", place)
    assert place.read_text() == "{}"


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "new" / "figures.json"
    with pytest.raises(DeadpanError, match="The figures cannot be written there") as caught:
        refuse_unwritable("figures", place)
    assert caught.value.found == f"{tmp_path / 'file'} is no folder"
    with pytest.raises(DeadpanError, match="The figures cannot be written: Not a dir"):  # noqa: SIM117
        with writing("figures", place):
            place.write_text("{}")


def test_so_is_a_folder_that_is_not_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everywhere, and tests may be run by root.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(DeadpanError) as caught:
        refuse_unwritable("run folder", tmp_path / "run")
    assert caught.value.found == f"{tmp_path} is not yours to write to"
