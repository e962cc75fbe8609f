"""Serves a language model of transformers over HTTP, its norms on rmsnorm, with nothing but Python's own server.

    python examples/serve.py                                   # a tiny LLaMA without training, to see it work
    python examples/serve.py --model HuggingFaceTB/SmolLM2-135M-Instruct    # or a folder that save_pretrained() wrote
    curl -d '{"prompt": "The norm of a row", "tokens": 20}' http://127.0.0.1:8000

Before it listens it generates a text with the model's own norms and with ours, and says whether the tokens are the same
and how long each took. `--ask TEXT` sends one request to itself, prints the answer, and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch

import rmsnorm

MOST_TOKENS = 1024


class Bytes:
    """The tokenizer of the tiny model: a token is a byte."""

    encode = staticmethod(lambda text: list(text.encode()))
    decode = staticmethod(lambda ids: bytes(ids).decode(errors="replace"))


def load(name: str | None):
    """The model and its tokenizer; without a name, a LLaMA of two layers with random weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, bos_token_id=None, eos_token_id=None)).eval(), Bytes()


def generate(model: torch.nn.Module, ids: list[int], tokens: int) -> tuple[list[int], float]:
    """The likeliest next tokens, one after the other, and the seconds that they took."""
    prompt = torch.tensor([ids])
    start = time.perf_counter()
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    return output[0, len(ids) :].tolist(), time.perf_counter() - start


def handler(answer: Callable[[str, int], dict]) -> type[BaseHTTPRequestHandler]:
    """POST {"prompt": text, "tokens": number} to any path; the answer is JSON."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                request = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                prompt, tokens = str(request["prompt"]), int(request.get("tokens", 20))
                if not prompt or not 0 < tokens <= MOST_TOKENS:
                    raise ValueError
                status, reply = 200, answer(prompt, tokens)
            except (ValueError, KeyError, TypeError):
                status, reply = 400, {"error": f'send {{"prompt": "some text", "tokens": 20}}; at most {MOST_TOKENS}'}
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        log_message = staticmethod(lambda *_: None)  # not every request

    return Handler


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder, or a name on the hub; without it, a tiny untrained model")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1; 0 for any that is free")
    parser.add_argument("--ask", metavar="TEXT", help="send this to the server, print its answer, and end")
    options = parser.parse_args()
    try:
        model, tokenizer = load(options.model)
        server = HTTPServer(("127.0.0.1", options.port), BaseHTTPRequestHandler)  # one request at a time
    except ModuleNotFoundError as missing:
        parser.error(f"{missing.name} is missing, which has the model: pip install transformers")
    except OSError as error:  # no such model, or the port is taken
        parser.error(str(error))

    ids = tokenizer.encode("The norm of a row is")
    generate(model, ids, 4)  # the first call of all is slow
    before, seconds_before = generate(model, ids, 32)
    print(rmsnorm.patch(model).summary())
    after, seconds_after = generate(model, ids, 32)
    print(f"32 tokens: {seconds_before:.2f} s before, {seconds_after:.2f} s after, the same: {before == after}")

    def answer(prompt: str, tokens: int) -> dict:
        ids, seconds = generate(model, tokenizer.encode(prompt), tokens)
        return {"text": tokenizer.decode(ids), "tokens": len(ids), "seconds": round(seconds, 3)}

    server.RequestHandlerClass = handler(answer)
    url = f"http://127.0.0.1:{server.server_port}"
    print(f"serving on {url}, Ctrl-C ends it", flush=True)
    with server:
        if options.ask is None:
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
            return 0
        threading.Thread(target=server.handle_request).start()
        with urllib.request.urlopen(url, json.dumps({"prompt": options.ask}).encode()) as reply:
            print(reply.read().decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
