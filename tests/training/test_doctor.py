import json
from pathlib import Path

import torch

from vertebra.training import doctor


def test_examination_is_json_and_every_device_computes_right(tmp_path: Path) -> None:
    facts = doctor.examine(tmp_path)
    json.dumps(facts)
    assert all(found["ok"] for found in facts["devices"].values()) and "cpu" in facts["devices"]
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0] or facts["versions"]["torch"]
    assert set(facts["extras"]) == {"pandas", "pyarrow", "ray"}
    assert facts["network"]["VERTEBRA_OFFLINE"] == "1"


def test_a_device_that_computes_wrong_is_reported(monkeypatch) -> None:
    right = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *args: right(*args) * 1.1)
    found = doctor.self_test(torch.device("cpu"))
    assert not found["ok"] and "results are off by 0.21" in found["error"]


def test_advice_names_what_is_slow() -> None:
    facts = {
        "devices": {"cpu": {"ok": True}, "mps": {"ok": False}},
        "memory_gb": {"available": 2.0},
        "disk_free_gb": 1.0,
        "threads": {"torch": 1},
        "system": {"cores": 8},
        "jpeg": {"turbo": True},
    }
    advice = " ".join(doctor.advice(facts))
    for words in ("mps computes wrong", "2.0 GB of memory", "1.0 GB of disk", "torch uses 1 of 8 cores"):
        assert words in advice
    assert "libjpeg-turbo" not in advice
