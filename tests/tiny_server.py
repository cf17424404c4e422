"""An OpenAI-compatible server that answers by the tiny LLM, and fails as servers do."""

import base64
import functools
import io
import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from conftest import CPU, ROOT

import elm

LLM = str(ROOT / "data" / "tiny" / "llm")
PART = "<part>"  # in a rendered template, the place of soft tokens

REPLIES_WITHOUT_ANSWER = {  # with status 200: of a router, of a server
    "moderated": {"error": {"code": 400, "message": "your input was flagged"}},
    "filtered": {"choices": [{"index": 0, "finish_reason": "content_filter", "message": None}]},
    "overloaded": {"error": {"code": 502, "message": "no instance is free"}}}


@functools.cache
def tiny_llm():
    return elm.load_llm(LLM, CPU, bf16=False)


class TinyServer(ThreadingHTTPServer):
    """The first requests about each message fail, each in the way that stands at its place in
    `failures`: a status, "garbage" with status 200, "half" an answer, or "nothing"; after a slash
    the value of a Retry-After header.

    A message is a text, or a list of parts: as in vLLM, a line break joins them, and soft tokens of
    type prompt_embeds stand in their place. `reads_parts` is False of a server that leaves these
    out, `tells_usage` of one that does not count; another chat template adds `template_end`."""

    daemon_threads = True

    def __init__(self, failures=(), reads_parts=True, tells_usage=True, template_end="",
                 served_model="", seconds=0.0, dies_at=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures = failures
        self.reads_parts = reads_parts
        self.tells_usage = tells_usage
        self.template_end = template_end
        self.served_model = served_model  # other names have status 404; "": none have
        self.seconds = seconds  # that an answer takes at least
        self.dies_at = dies_at  # the number of the request, from 0, that finds nobody there
        self.answers_about = []  # texts; requests about these do not fail
        self.refused_text = None  # requests about it fail with status 400; "": all
        self.refused_soft_tokens = None  # [K, D]; also
        self.num_asked = Counter()  # by message
        self.num_open = 0  # requests that wait for their answer
        self.most_open = 0
        self.keys = set()
        self.bodies = []  # of all requests
        self.prompt = elm.Prompt(elm.load_tokenizer(LLM))
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"endpoint=http://127.0.0.1:{self.server_port}/v1"

    def stop(self) -> None:
        """From now on connections are refused."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Where a client was killed, there is nobody to answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def failure_of(self, message: str, content: str | list[dict]) -> str:
        """How to fail at this request, or ""."""
        self.num_asked[message] += 1
        number = self.num_asked[message] - 1
        if self.refused_text is not None and self.refused_text in message:
            return "400"
        if self.refused_soft_tokens is not None:
            (soft_tokens,) = [decode_part(part) for part in content if part["type"] != "text"]
            if torch.allclose(soft_tokens, self.refused_soft_tokens, atol=1e-4):
                return "400"
        if any(text in message for text in self.answers_about):
            return ""
        return self.failures[number] if number < len(self.failures) else ""

    @torch.no_grad()
    def answer(self, content: str | list[dict], max_tokens: int) -> bytes:
        embeds = self.embed_text(content) if isinstance(content, str) else self.embed(content)
        with self.lock:
            (answer,) = elm.generate_batch(tiny_llm(), self.prompt, [embeds], max_tokens)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": "stop" if answer.finished else "length"}
        reply = {"object": "chat.completion", "choices": [choice]}
        if self.tells_usage:
            reply["usage"] = {"prompt_tokens": len(embeds)}
        return json.dumps(reply).encode()

    def embed_text(self, text: str) -> torch.Tensor:
        """[T, D]"""
        prompt = self.prompt
        ids = prompt.prefix_ids + prompt.encode([text])[0] + prompt.suffix_ids
        return tiny_llm().get_input_embeddings()(torch.tensor(ids))

    def embed(self, parts: list[dict]) -> torch.Tensor:
        """[T, D]: the template is rendered and encoded apart from elm."""
        texts = []
        soft_tokens = torch.empty(0, 0)
        for part in parts:
            if part["type"] == "text":
                texts.append(part["text"])
            elif self.reads_parts:
                assert part["type"] == "prompt_embeds"
                soft_tokens = decode_part(part)
                texts.append(PART)
        turn = {"role": "user", "content": "\n".join(texts)}
        tokenizer = self.prompt.tokenizer
        rendered = tokenizer.apply_chat_template(
            [turn], tokenize=False, add_generation_prompt=True) + self.template_end
        pieces = []
        for text in rendered.split(PART):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            pieces += [tiny_llm().get_input_embeddings()(torch.tensor(ids)), soft_tokens]
        return torch.cat(pieces[:-1])


def decode_part(part: dict) -> torch.Tensor:
    """Soft tokens [K, D]."""
    data = base64.b64decode(part["data"], validate=True)
    return torch.load(io.BytesIO(data), weights_only=True)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        message = content if isinstance(content, str) else json.dumps(content)
        with server.lock:
            number = len(server.bodies)
            server.keys.add(self.headers["Authorization"])
            server.bodies.append(body)
            failure = server.failure_of(message, content)
            server.num_open += 1
            server.most_open = max(server.most_open, server.num_open)
        if server.dies_at is not None and number >= server.dies_at:
            server.stop()
            return
        if server.served_model not in ("", body["model"]):
            failure = "404"
        time.sleep(server.seconds)
        failure, _, retry_after = failure.partition("/")
        reply = b""
        if failure in ("", "half"):
            reply = server.answer(content, body["max_tokens"])
        with server.lock:
            server.num_open -= 1
        if failure != "nothing":
            self.reply(failure, retry_after, reply)

    def reply(self, failure: str, retry_after: str, reply: bytes) -> None:
        """Send an answer, or what stands for one in this kind of failure."""
        if failure == "400":
            reply = json.dumps({"message": "maximum context length exceeded"}).encode()
        elif failure in REPLIES_WITHOUT_ANSWER:
            reply = json.dumps(REPLIES_WITHOUT_ANSWER[failure]).encode()
        elif failure not in ("", "half"):
            reply = b"<garbage\xff"
        status = int(failure) if failure.isdecimal() else 200
        missing = 9 if failure == "half" else 0
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply) + missing))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        else:
            self.send_header("Retry-After-Ms", "1")  # or the tests would wait as long as users do
        self.end_headers()
        self.wfile.write(reply)
