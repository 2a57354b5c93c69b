"""Records of benchmarks."""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from record import write_record


def test_a_record_keeps_no_folders(tmp_path):
    path = tmp_path / "new" / "figures.json"
    options = argparse.Namespace(json=path, data=tmp_path / "images", weights=[tmp_path / "a.pth"], size=3)
    write_record(path, options, [{"ratio": 1.0}])
    text = path.read_text()
    assert str(tmp_path) not in text
    assert '"images"' in text
    assert '"a.pth"' in text
