"""Does the command-line tool `llm` chat here, and is its history reused?

Arguments: the base URL (with /v1), the model, and an empty folder for llm's own files. One question, then one that
continues it (`-c`), which resends the history.
"""

import json
import os
import pathlib
import subprocess
import sys

BASE, MODEL, FOLDER = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
LLM = pathlib.Path(sys.executable).with_name("llm")
FOLDER.joinpath("extra-openai-models.yaml").write_text(
    json.dumps([{"model_id": "here", "model_name": MODEL, "api_base": BASE, "api_key_name": "here"}])
)
env = os.environ | {"LLM_USER_PATH": str(FOLDER)}


def llm(*arguments: str) -> str:
    return subprocess.run([LLM, *arguments], env=env, check=True, capture_output=True, text=True, timeout=120).stdout


known = 0
llm("keys", "set", "here", "--value", "none")
for number, (turn, more) in enumerate([("My name is Ada and I come from Turin.", []), ("What is my name?", ["-c"])]):
    said = llm("prompt", turn, "-m", "here", "-o", "temperature", "0", "-o", "max_tokens", "24", *more)
    [logged] = json.loads(llm("logs", "list", "-n", "1", "--json"))
    tokens = logged["input_tokens"]
    cached = (json.loads(logged["token_details"] or "{}").get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    print(f"turn {number + 1}: {tokens} tokens in, {cached} cached: {said.strip()!r}")
    assert said.strip(), "an empty answer"
    assert number == 0 or cached >= known - 16, f"{cached} cached of {known} known"
    known = tokens
