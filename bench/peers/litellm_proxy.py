"""LiteLLM's proxy as its documentation advises for production: one worker, a master key, no debug output, no database.

Its price list is the one it ships with and its telemetry is off: the benchmark sends nothing anywhere.
"""

import json
import os
from pathlib import Path

from bench.processes import NotMeasured, Running, answers, free_port
from bench.upstream import STREAM, WHOLE

HOME = Path(__file__).parent.parent / ".peers" / "litellm"
PROGRAM = HOME / "bin" / "litellm"
MASTER_KEY = "sk-bench-0123456789abcdef"
START_S_MAX = 120.0


def is_installed() -> bool:
    return PROGRAM.exists()


def version() -> str:
    """The installed version, read from its metadata so that nothing of it is imported."""
    found = sorted(HOME.glob("lib/python*/site-packages/litellm-[0-9]*.dist-info"))
    return found[0].name.removeprefix("litellm-").removesuffix(".dist-info") if found else "unknown"


def configuration(upstream_port: int) -> str:
    """Its configuration; JSON is YAML."""
    base = f"http://127.0.0.1:{upstream_port}"
    # With a price here it needn't look for one at every call, which would cost it a fifth of its speed.
    common = {
        "model": f"openai/{WHOLE}",
        "api_key": "none",
        "input_cost_per_token": 1e-7,
        "output_cost_per_token": 2e-7,
    }
    models = [
        {"model_name": name, "litellm_params": {**common, "api_base": url}}
        for name, url in ((WHOLE, f"{base}/v1"), (STREAM, f"{base}/stream/v1"))
    ]
    return json.dumps(
        {
            "model_list": models,
            "general_settings": {"master_key": MASTER_KEY},
            "litellm_settings": {"telemetry": False, "set_verbose": False, "json_logs": False},
        }
    )


def start(folder: Path, upstream_port: int) -> tuple[Running, int]:
    """Start it on a free port. Raises NotMeasured."""
    if not is_installed():
        raise NotMeasured("LiteLLM is not installed: run bench/peers/install")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "litellm.yaml"
    file.write_text(configuration(upstream_port))
    port = free_port()
    env = {
        "HOME": str(folder),
        "PATH": f"{PROGRAM.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
    }
    argv = (
        PROGRAM, "--config", file, "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1",
        "--telemetry", "False",
    )  # fmt: skip
    running = Running("LiteLLM", argv, log=folder / "litellm.log", env=env, cwd=folder)
    try:
        running.wait_until(answers(port, "/health/readiness"), within_s=START_S_MAX)
    except BaseException:
        running.stop()
        raise
    return running, port
