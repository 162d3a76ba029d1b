"""Serve an exported native folder with other projects' servers, and compare their greedy text with ours.

    python scripts/check_serving.py model=FOLDER [llama_cpp=CLONE] [pre=gpt-2] [tokens=32]

`transformers serve` (`pip install openai fastapi uvicorn`) loads the folder and answers `/v1/completions`.
With `llama_cpp`, a clone of llama.cpp, the folder is also converted to a float32 GGUF file, which llama.cpp
completes from (`pip install xllamacpp`). That converter recognizes published tokenizers only; for another
one, `pre` names its pre-tokenizer as llama.cpp does. The exit code is 3 if a text differs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from tabulate import tabulate

PROMPTS = ("def read(path):", "import os\n", 'class Reader:\n    """', "    for name in names:\n")
CONVERT = """
import runpy, sys
clone, pre = sys.argv[1:3]
sys.path[:0] = [clone, clone + "/gguf-py"]
if pre:
    from conversion import base
    for each in vars(base).values():
        if isinstance(each, type) and hasattr(each, "get_vocab_base_pre"):
            each.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[3:]]
runpy.run_path(clone + "/convert_hf_to_gguf.py", run_name="__main__")
"""
COMPLETE = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_gpu_layers = sys.argv[1], 0
server = xllamacpp.Server(params)
for prompt in json.loads(sys.argv[2]):
    request = {"prompt": prompt, "max_tokens": int(sys.argv[3]), "temperature": 0, "top_k": 1}
    print("COMPLETION", json.dumps(server.handle_completions(request)["choices"][0]["text"]), flush=True)
"""


def main(words: list[str]) -> int:
    options = {"model": "", "llama_cpp": "", "pre": "", "tokens": "32"}
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if given.keys() - options.keys() or not given.get("model") or len(given) != len(words):
        print("error: give model=FOLDER, and words as the head of this file says.", file=sys.stderr)
        return 2
    options.update(given)
    folder, tokens = str(Path(options["model"]).resolve()), int(options["tokens"])
    texts = {"mptfoundry generate": ours(folder, tokens)}
    texts["transformers serve"] = served(folder, tokens)
    if options["llama_cpp"]:
        texts["llama.cpp"] = completed(folder, options["llama_cpp"], options["pre"], tokens)
    expected, *_ = texts.values()
    equal = {name: sum(map(str.__eq__, each, expected)) for name, each in texts.items()}
    print(
        tabulate([[name, f"{count} of {len(PROMPTS)}"] for name, count in equal.items()], ["", "equal texts"])
    )
    for number, prompt in enumerate(PROMPTS):
        if len({each[number] for each in texts.values()}) > 1:
            for name, each in texts.items():
                print(f"{prompt!r} {name}: {each[number]!r}")
    return 0 if set(equal.values()) == {len(PROMPTS)} else 3


def ours(folder: str, tokens: int) -> list[str]:
    """What `mptfoundry generate` writes after each prompt."""
    import mptfoundry

    network, tokenizer = mptfoundry.load_model(folder)
    return mptfoundry.generate_text(network, tokenizer, PROMPTS, max_new_tokens=tokens)


def served(folder: str, tokens: int) -> list[str]:
    """What `transformers serve` answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["transformers", "serve", folder, "--device", "cpu", "--dtype", "float32", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server)
            request = {"model": folder, "max_tokens": tokens, "temperature": 0}
            url = f"http://127.0.0.1:{port}/v1/completions"
            return [ask(url, {**request, "prompt": prompt}) for prompt in PROMPTS]
        except urllib.error.HTTPError as error:
            log.seek(0)
            raise SystemExit(
                f"error: {error}: {error.read().decode()}\n{log.read().decode()[-2000:]}"
            ) from None
        finally:
            server.terminate()
            server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes], seconds: float = 180) -> None:
    """Wait until a server answers."""
    for _ in range(int(seconds)):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            if server.poll() is not None:
                raise SystemExit("error: the server ended before it answered.") from None
            time.sleep(1)
    raise SystemExit(f"error: {url} has not answered for {seconds:.0f} seconds.")


def ask(url: str, body: dict[str, object]) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def completed(folder: str, clone: str, pre: str, tokens: int) -> list[str]:
    """What llama.cpp writes after each prompt, from a GGUF file of the folder."""
    with tempfile.TemporaryDirectory() as temporary:
        file = str(Path(temporary, "model.gguf"))
        clone = str(Path(clone).resolve())
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
        convert = [sys.executable, "-c", CONVERT, clone, pre, folder, "--outfile", file, "--outtype", "f32"]
        done = subprocess.run(convert, env=quiet, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: llama.cpp's converter failed:\n{done.stderr[-2000:]}")
        complete = [sys.executable, "-c", COMPLETE, file, json.dumps(PROMPTS), str(tokens)]
        done = subprocess.run(complete, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("COMPLETION ")]
    if len(lines) != len(PROMPTS):
        raise SystemExit(f"error: llama.cpp did not answer:\n{done.stderr[-2000:]}")
    return [json.loads(line.removeprefix("COMPLETION ")) for line in lines]


if __name__ == "__main__":
    from words import given_words

    sys.exit(main(given_words(__doc__)))
