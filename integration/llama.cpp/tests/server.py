#!/usr/bin/env python3
"""llama-server on a coded cache: four slots at once, then prompts that come back from the RAM prompt cache.

    server.py LLAMA_SERVER MODEL FACTORS

The factors are loaded, so an answer does not depend on what was asked before or at the same time.
"""
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

TOPICS = ["the history of paper", "how bridges carry load", "why the sea is salt", "the life of bees",
          "sorting a list of numbers", "the phases of the moon", "baking bread at home", "how a clock keeps time",
          "the rules of chess", "growing tomatoes", "the first railways", "reading a map"]


def prompt(i):
    filler = " ".join(f"Note {n} about {TOPICS[i]}: it has {n * 7 % 13} parts." for n in range(30))
    return f"{filler}\nIn short, {TOPICS[i]} is"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    def __init__(self, binary, model, factors):
        self.port = free_port()
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        self.process = subprocess.Popen(
            [binary, "-m", model, "-ctk", "dq4", "-ctv", "dq4", "--kv-factors", factors, "-np", "4", "-c", "6144", "-t", "1",
             "--cache-ram", "512", "--host", "127.0.0.1", "--port", str(self.port), "-lv", "4"],
            stdout=self.log, stderr=subprocess.STDOUT)
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                    return
            except OSError:
                if self.process.poll() is not None:
                    raise RuntimeError(f"llama-server ended with {self.process.returncode}:\n{self.text()[-3000:]}")
                time.sleep(0.1)
        raise RuntimeError("llama-server does not answer")

    def text(self):
        with open(self.log.name, errors="replace") as f:
            return f.read()

    def complete(self, i):
        body = {"prompt": prompt(i), "n_predict": 24, "temperature": 0, "cache_prompt": True}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/completion", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


def main():
    server = Server(*sys.argv[1:4])
    try:
        # four slots at once
        first = [None] * 4

        def ask(i):
            first[i] = server.complete(i)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert all(first), "a slot gave no answer"

        # other prompts push them out of their slots
        for i in range(4, len(TOPICS)):
            server.complete(i)

        # and they come back, from RAM
        from_cache = 0
        for i in range(4):
            again = server.complete(i)
            assert again["content"] == first[i]["content"], \
                f"prompt {i}: {first[i]['content']!r} at first, {again['content']!r} from the cache"
            from_cache += again["timings"]["cache_n"] > 100
        assert from_cache == 4, f"{from_cache} of 4 prompts came from the cache"
    finally:
        server.stop()
    text = server.text()
    assert "sets of K" in text, "no word about the sets at the end"
    print(f"four slots at once, then 8 other prompts: {from_cache} of 4 prompts come back from RAM with the same answers")


if __name__ == "__main__":
    main()
