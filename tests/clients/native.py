#!/usr/bin/env python3
"""A client of Forebay's native protocol, version 1, in Python's standard library alone.

Written from src/protocol/README.md, not from the server's code: where the two disagree, one of
them is wrong. The end-to-end tests run it; it also shows how little a client needs.

    native.py HOST:PORT "Name three rivers."      one chat message, answer as JSON lines
    native.py HOST:PORT --raw "Once upon a time"  a raw prompt
    native.py HOST:PORT --ids 1,2,3               token ids
    native.py HOST:PORT --stats                   the server's numbers
"""

import argparse
import json
import socket
import struct
import sys

HELLO, WELCOME, REQUEST_CREDIT, PING, PONG = 0x01, 0x02, 0x03, 0x04, 0x05
STATS, STATS_REPLY, GOING_AWAY, ERROR = 0x06, 0x07, 0x08, 0x09
REQUEST, BODY, CREDIT, CANCEL = 0x10, 0x11, 0x12, 0x13
ACCEPTED, TOKENS, PAUSED, RESUMED, DONE, REJECTED = 0x20, 0x21, 0x22, 0x23, 0x24, 0x25

FINISH = ["end_of_text", "stop_string", "max_tokens", "context_full", "cancelled", "deadline",
          "stalled", "shutting_down", "device_failed", "operator"]
REASON = ["queue_full", "exceeds_capacity", "invalid", "too_many_streams", "shutting_down",
          "no_capacity", "deadline_unattainable", "queue_ttl_expired", "deadline_expired",
          "ttft_unattainable", "tenant_rate"]
ROLE = {"system": 0, "user": 1, "assistant": 2, "tool": 3}

# Options: tag, and how its value is packed.
OPTIONS = {
    "temperature": (1, "<f"), "top_k": (2, "<I"), "top_p": (3, "<f"), "min_p": (4, "<f"),
    "repetition_penalty": (5, "<f"), "frequency_penalty": (6, "<f"),
    "presence_penalty": (7, "<f"), "seed": (8, "<Q"), "logprobs": (9, "<B"),
}


class ProtocolError(Exception):
    """The server ended the connection, or broke the protocol."""


def frame(kind, stream=0, payload=b""):
    """A frame: 12 bytes of header, then the payload."""
    return struct.pack("<IBBHI", len(payload), kind, 0, 0, stream) + payload


def hello(client="native.py/1", token="", versions=(1, 1), capabilities=0b111):
    """The first frame of a connection."""
    name, secret = client.encode(), token.encode()
    return frame(HELLO, 0, b"FBAY" + struct.pack("<HHI", *versions, capabilities)
                 + struct.pack("<B", len(name)) + name
                 + struct.pack("<H", len(secret)) + secret)


def option(tag, value=b""):
    """One option of a request."""
    return struct.pack("<BH", tag, len(value)) + value


def options(stop=(), logit_bias=(), ignore_eos=False, **values):
    """All options of a request; what is not named keeps its default."""
    out = b""
    for name, value in values.items():
        tag, packing = OPTIONS[name]
        out += option(tag, struct.pack(packing, value))
    if ignore_eos:
        out += option(10)
    if logit_bias:
        out += option(16, b"".join(struct.pack("<If", token, bias) for token, bias in logit_bias))
    for text in stop:
        out += option(17, text.encode())
    return out


def prompt_bytes(messages=None, raw=None, ids=None):
    """The kind of a prompt and its bytes."""
    if messages is not None:
        out = struct.pack("<H", len(messages))
        for role, content in messages:
            content = content.encode()
            out += struct.pack("<BI", ROLE[role], len(content)) + content
        return 0, out
    if raw is not None:
        return 1, raw.encode()
    return 2, struct.pack("<%dI" % len(ids), *ids)


def request(stream, prompt, opts=b"", tenant="", user="", klass=2, max_tokens=0, deadline_ms=0,
            window_tokens=64, part_bytes=16384):
    """The frames of a request: REQUEST, and BODY frames for what does not fit it."""
    kind, content = prompt
    tenant, user, body = tenant.encode(), user.encode(), opts + content
    head = struct.pack("<BBBBIIIII", klass, kind, len(tenant), len(user), max_tokens, deadline_ms,
                       window_tokens, len(opts), len(content)) + tenant + user
    out = frame(REQUEST, stream, head + body[:part_bytes])
    for at in range(part_bytes, len(body), part_bytes):
        out += frame(BODY, stream, body[at:at + part_bytes])
    return out


class Reader:
    """Fields of a payload, one after another."""

    def __init__(self, payload):
        self.payload, self.at = payload, 0

    def take(self, count):
        part = self.payload[self.at:self.at + count]
        if len(part) != count:
            raise ProtocolError("a payload is too short")
        self.at += count
        return part

    def read(self, packing):
        values = struct.unpack(packing, self.take(struct.calcsize(packing)))
        return values[0] if len(values) == 1 else values

    def text(self, packing):
        return self.take(self.read(packing)).decode()


def read_welcome(payload):
    """WELCOME as a dictionary. More fields may follow in a later minor version."""
    r = Reader(payload)
    version, _ = r.read("<HH")
    names = ["capabilities", "frame_bytes_max", "request_bytes_max", "streams_max",
             "window_tokens_max", "request_credit", "vocab_tokens", "context_tokens",
             "idle_timeout_ms"]
    welcome = dict(zip(names, r.read("<9I")))
    return {"version": version, **welcome, "model": r.text("<B"), "server": r.text("<B")}


def read_event(kind, payload):
    """A frame of a stream as a dictionary."""
    r = Reader(payload)
    if kind == ACCEPTED:
        position, prompt_tokens, max_tokens = r.read("<III")
        event = {"event": "accepted", "position": position, "prompt_tokens": prompt_tokens,
                 "max_tokens": max_tokens}
    elif kind == TOKENS:
        count, logprob_count, text_bytes = r.read("<HHI")
        event = {"event": "tokens", "ids": list(struct.unpack("<%dI" % count, r.take(4 * count))),
                 "text": r.take(text_bytes).decode()}
        if logprob_count:
            event["logprobs"] = [read_logprob(r) for _ in range(logprob_count)]
    elif kind == PAUSED:
        event = {"event": "paused"}
    elif kind == RESUMED:
        event = {"event": "resumed"}
    elif kind == DONE:
        finish, _, _, _ = r.read("<BBBB")
        prompt_tokens, cached_tokens, output_tokens = r.read("<III")
        queue_ns, ttft_ns, total_ns, parked_ns = r.read("<QQQQ")
        event = {"event": "done", "finish": FINISH[finish], "prompt_tokens": prompt_tokens,
                 "cached_tokens": cached_tokens, "output_tokens": output_tokens,
                 "queue_ns": queue_ns, "ttft_ns": ttft_ns, "total_ns": total_ns,
                 "parked_ns": parked_ns}
    elif kind == REJECTED:
        reason, do_not_retry, _, retry_after_ms = r.read("<BBHI")
        event = {"event": "rejected", "reason": REASON[reason],
                 "retry_after_ms": None if do_not_retry else retry_after_ms,
                 "message": r.text("<H")}
    else:
        raise ProtocolError("frame 0x%02x was not expected" % kind)
    if r.at != len(payload):
        raise ProtocolError("a payload is too long")
    return event


def read_logprob(r):
    logprob, top_count, _ = r.read("<fHH")
    return {"logprob": logprob, "top": [list(r.read("<If")) for _ in range(top_count)]}


class Connection:
    """A connection with any number of streams."""

    def __init__(self, host, port, token="", timeout_s=60):
        self.socket = socket.create_connection((host, port), timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""
        self.stream_next = 1
        self.streams = {}  # number → credit outstanding and owed
        self.stats_replies = []
        self.going_away = False
        self.socket.sendall(hello(token=token))
        kind, _, payload = self.next_frame()
        if kind != WELCOME:
            raise ProtocolError("WELCOME was expected, not 0x%02x" % kind)
        self.welcome = read_welcome(payload)
        self.request_credit = self.welcome["request_credit"]

    def close(self):
        self.socket.close()

    def next_frame(self):
        """The next frame; an ERROR is raised."""
        head = self.receive(12)
        length, kind, flags, reserved, stream = struct.unpack("<IBBHI", head)
        if flags or reserved or length > 1 << 20:
            raise ProtocolError("a header broke the rules")
        payload = self.receive(length)
        if kind == ERROR:
            r = Reader(payload)
            code, _, about = r.read("<HHI")
            raise ProtocolError("error %d (stream %d): %s" % (code, about, r.text("<H")))
        return kind, stream, payload

    def receive(self, count):
        while len(self.buffer) < count:
            part = self.socket.recv(65536)
            if not part:
                raise ProtocolError("the connection is closed")
            self.buffer += part
        part, self.buffer = self.buffer[:count], self.buffer[count:]
        return part

    def start(self, prompt, window_tokens=64, **arguments):
        """Sends a request, when there is request credit; returns its stream's number."""
        if self.request_credit == 0:
            raise ProtocolError("no request credit: take events until some comes")
        window_tokens = min(window_tokens, self.welcome["window_tokens_max"])
        number = self.stream_next
        self.stream_next += 1
        self.request_credit -= 1
        self.streams[number] = {"outstanding": window_tokens, "owed": 0, "window": window_tokens}
        part = min(16384, self.welcome["frame_bytes_max"] - 256)
        self.socket.sendall(request(number, prompt, window_tokens=window_tokens, part_bytes=part,
                                    **arguments))
        return number

    def cancel(self, number):
        self.socket.sendall(frame(CANCEL, number))

    def next_event(self):
        """The next event of any stream, as (number, dictionary). Gives credit for tokens."""
        while True:
            kind, number, payload = self.next_frame()
            if kind == REQUEST_CREDIT:
                self.request_credit += Reader(payload).read("<I")
            elif kind == PING:
                self.socket.sendall(frame(PONG, 0, payload))
            elif kind == GOING_AWAY:
                self.going_away = True
            elif kind == STATS_REPLY:
                r = Reader(payload)
                pairs = [(r.read("<Q"), r.text("<B")) for _ in range(r.read("<H"))]
                self.stats_replies.append({name: value for value, name in pairs})
                return 0, {"event": "stats"}
            elif kind == PONG:
                return 0, {"event": "pong"}
            else:
                event = read_event(kind, payload)
                self.account(number, event)
                return number, event

    def account(self, number, event):
        if event["event"] == "tokens":
            stream, count = self.streams[number], len(event["ids"])
            stream["outstanding"] -= count
            if stream["outstanding"] < 0:
                raise ProtocolError("more tokens than there was credit for")
            stream["owed"] += count
            if stream["owed"] * 2 >= stream["window"]:
                self.socket.sendall(frame(CREDIT, number, struct.pack("<I", stream["owed"])))
                stream["outstanding"] += stream["owed"]
                stream["owed"] = 0
        elif event["event"] in ("done", "rejected"):
            del self.streams[number]

    def run(self, prompt, **arguments):
        """One request's events, to its end."""
        number = self.start(prompt, **arguments)
        while True:
            about, event = self.next_event()
            if about == number:
                yield event
                if event["event"] in ("done", "rejected"):
                    return

    def stats(self):
        self.socket.sendall(frame(STATS))
        while not self.stats_replies:
            self.next_event()
        return self.stats_replies.pop(0)


def main():
    parser = argparse.ArgumentParser(description="A client of Forebay's native protocol.")
    parser.add_argument("address", help="HOST:PORT")
    parser.add_argument("prompt", nargs="?", default="")
    parser.add_argument("--raw", action="store_true", help="the prompt is text, not a message")
    parser.add_argument("--ids", help="token ids with commas between them")
    parser.add_argument("--stats", action="store_true", help="print the server's numbers")
    parser.add_argument("--token", default="")
    parser.add_argument("--max-tokens", type=int, default=0)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--logprobs", type=int)
    parser.add_argument("--stop", action="append", default=[])
    parser.add_argument("--ignore-eos", action="store_true")
    arguments = parser.parse_args()
    host, _, port = arguments.address.rpartition(":")
    connection = Connection(host, int(port), arguments.token)
    if arguments.stats:
        print(json.dumps(connection.stats()))
        return 0
    if arguments.ids:
        prompt = prompt_bytes(ids=[int(number) for number in arguments.ids.split(",")])
    elif arguments.raw:
        prompt = prompt_bytes(raw=arguments.prompt)
    else:
        prompt = prompt_bytes(messages=[("user", arguments.prompt)])
    values = {name: getattr(arguments, name) for name in ("temperature", "seed", "logprobs")
              if getattr(arguments, name) is not None}
    opts = options(stop=arguments.stop, ignore_eos=arguments.ignore_eos, **values)
    finish = None
    for event in connection.run(prompt, opts=opts, max_tokens=arguments.max_tokens,
                                window_tokens=arguments.window):
        print(json.dumps(event), flush=True)
        finish = event["event"]
    connection.close()
    return 0 if finish == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
