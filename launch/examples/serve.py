"""Serve an exported classifier over HTTP, by transformers and Python's own library alone.

    python launch/examples/serve.py FOLDER [PORT]                     PORT 0, the default, is any that is free
    curl -d 'Return the largest element.' http://127.0.0.1:PORT

FOLDER is what `dsdistill export` wrote. The body of a request is a text, or several with one per line; the answer is
JSON. It listens only on this machine: a server for others would also need to limit who may ask, and how much.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

LONGEST = 2**20  # most bytes of a request


class Handler(BaseHTTPRequestHandler):
    """Answer a request by the probabilities of the classes."""

    def do_POST(self) -> None:
        """Read the texts, one per line, and write a list of {label: probability}."""
        size = int(self.headers.get("Content-Length", "0"))
        texts = self.rfile.read(min(size, LONGEST)).decode("utf-8", "replace").splitlines()
        if not texts or size > LONGEST:
            self.send_error(400, f"got {size} bytes, expected a text of 1 to {LONGEST}")
            return
        answer = json.dumps(self.server.classify(texts)).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


def main() -> None:
    """Load the model once and answer until the process is stopped."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).float().eval()

    @torch.inference_mode()
    def classify(texts: list[str]) -> list[dict[str, float]]:
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        rows = model(**batch).logits.softmax(-1).tolist()
        return [{model.config.id2label[i]: round(p, 4) for i, p in enumerate(row)} for row in rows]

    server = ThreadingHTTPServer(("127.0.0.1", int((sys.argv[2:] or ["0"])[0])), Handler)
    server.classify = classify
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
