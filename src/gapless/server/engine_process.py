"""The process of a server's engine: `python -m gapless.server.engine_process FD`, with one end of a socket pair as FD.

It loads what the first message says, then takes requests and cancels and sends one message for each step. It ends when
the server does, or when its engine has died.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from gapless.engine.core import EngineFailure
from gapless.errors import EngineDeadError, GaplessError, InternalError
from gapless.loading import LoadedEngine, load_engine
from gapless.outcome import Committed, Finished
from gapless.params import SamplingParams
from gapless.prefix import DIGEST_BYTES
from gapless.request import FinishReason, Form, Request
from gapless.server.messages import (
    Answer,
    Ask,
    Cancel,
    Failed,
    Message,
    Ready,
    Sent,
    Start,
    StatsAnswer,
    Submit,
    TimelineAnswer,
    ToEngine,
    Wire,
    pack_step,
)
from gapless.spans import Run
from gapless.trace.record import Trace

FORM_THREADS = 2


class EngineServer:
    """Between the socket and an engine of this process."""

    def __init__(self, wire: Wire, loaded: LoadedEngine, trace: Trace | None) -> None:
        self._wire = wire
        self._loaded = loaded
        self._engine = loaded.engine
        self._trace = trace
        self._sending = threading.Lock()
        self._forming: dict[int, bool] = {}  # requests that wait for their form -> whether they were cancelled
        self._lock = threading.Lock()
        self._forms = ThreadPoolExecutor(FORM_THREADS, "gapless-forms")
        self._asks = ThreadPoolExecutor(1, "gapless-asks")

    def serve(self) -> int:
        """Until the server is gone or the engine has died. Returns the exit status."""
        sender = threading.Thread(target=self._send_steps, name="gapless-steps", daemon=True)
        sender.start()
        while (message := self._wire.receive()) is not None:
            if isinstance(message, Submit):
                self._submit(message)
            elif isinstance(message, Cancel):
                self._cancel(message)
            elif isinstance(message, Ask):
                self._answer(message)
            else:
                raise InternalError(f"an engine that runs was sent {type(message).__name__}")
        return 0 if self._engine.alive else 1

    def _send(self, message: Message) -> None:
        with self._sending:
            self._wire.send(message)

    def _send_steps(self) -> None:
        try:
            while not isinstance(record := self._engine.next_output(), EngineFailure):
                assert record is not None
                self._send(pack_step(record))
            self._send(Failed("EngineDeadError", str(record.error)))
        except OSError:  # the server is gone, and serve() sees it
            return
        self._wire.close()  # no more comes: serve() ends

    def _submit(self, message: Submit) -> None:
        params = SamplingParams(**message.requests[0].params)
        if not params.has_form:
            self._engine_submit([self._request(sent, params, None) for sent in message.requests])
            return
        with self._lock:
            self._forming.update((sent.request_id, False) for sent in message.requests)
        self._forms.submit(self._submit_formed, message, params)

    def _submit_formed(self, message: Submit, params: SamplingParams) -> None:
        """On a thread: a form that takes long to make holds up nobody else."""
        try:
            first = message.requests[0]
            form = self._loaded.forms.form_of(params, _ints(first.prompt), _ints(first.stop_ids).tolist())
            error = None
        except Exception as refused:  # noqa: BLE001 - the server has made it before; whatever it is, the request ends
            form, error = None, str(refused)
        requests: list[Request] = []
        finished: list[Finished] = []
        with self._lock:
            for sent in message.requests:
                cancelled = self._forming.pop(sent.request_id)
                if error is not None:
                    finished.append(Finished(sent.request_id, FinishReason.ERROR, 0, error=error))
                elif cancelled:
                    finished.append(Finished(sent.request_id, FinishReason.CANCELLED, 0))
                else:
                    requests.append(self._request(sent, params, form))
            self._engine_submit(requests)  # under the lock: a cancel comes before it or after
        if finished:
            self._engine.outputs.put(Committed.without_tokens(tuple(finished)))

    def _engine_submit(self, requests: list[Request]) -> None:
        with suppress(EngineDeadError):  # whoever sends steps tells it
            self._engine.submit(requests)

    def _request(self, sent: Sent, params: SamplingParams, form: Form | None) -> Request:
        if sent.leader >= 0 and params.prompt_logprobs is not None:  # the first one brings them
            params = replace(params, prompt_logprobs=None)
        return Request(
            request_id=sent.request_id,
            prompt=_ints(sent.prompt),
            params=params,
            max_length=sent.max_length,
            stop_ids=_ints(sent.stop_ids),
            seed=sent.seed,
            priority=sent.priority,
            salt=sent.salt,
            digests=tuple(sent.digests[at : at + DIGEST_BYTES] for at in range(0, len(sent.digests), DIGEST_BYTES)),
            stops=self._loaded.encoder.stops(params),
            leader=sent.leader,
            line=_ints(sent.line),
            counts=sent.counts,
            form=form,
            arguments=np.frombuffer(sent.arguments, dtype=np.float32),
        )

    def _cancel(self, message: Cancel) -> None:
        with self._lock:
            waiting = [each for each in message.request_ids if each in self._forming]
            self._forming.update((each, True) for each in waiting)
        self._engine.cancel(each for each in message.request_ids if each not in waiting)

    def _answer(self, ask: Ask) -> None:
        """Stats at once; what waits for the engine on a thread."""
        if ask.what == "stats":
            self._send(StatsAnswer(ask.number, self._engine.stats()))
        elif ask.what == "timeline":
            self._asks.submit(lambda: self._send(TimelineAnswer(ask.number, self._last_steps(ask.argument))))
        else:
            self._asks.submit(self._obey, ask)

    def _obey(self, ask: Ask) -> None:
        engine = self._engine
        work: dict[str, Callable[[], None]] = {
            "lookahead": lambda: engine.set_lookahead(ask.argument),
            "pause": engine.pause,
            "resume": engine.resume,
            "sleep": engine.sleep,
            "wake": engine.wake,
        }
        try:
            work[ask.what]()
        except Exception as error:  # noqa: BLE001 - who asked is told
            self._send(Answer(ask.number, type(error).__name__, str(error)))
        else:
            self._send(Answer(ask.number))

    def _last_steps(self, steps: int) -> list[Run]:
        if self._trace is None:
            return []
        runs: list[Run] = []
        for run in self._trace.runs():
            latest = max(span.step for span in run.spans)
            spans = [span for span in run.spans if span.step > latest - steps]
            runs.append(run._replace(spans=spans))
        return runs


def _ints(data: bytes) -> Any:
    return np.frombuffer(data, dtype=np.int32)


def run(end: socket.socket) -> int:
    """Serve this end of a socket pair. Returns the exit status."""
    wire = Wire(end, ToEngine)
    start = wire.receive()
    if start is None:
        return 0
    assert isinstance(start, Start)
    trace = Trace(start.timeline) if start.timeline else None
    try:
        loaded = load_engine(
            start.model,
            start.config,
            load=start.load,
            shape=start.shape,
            tokenizer=start.tokenizer,
            trace=trace,
        )
    except GaplessError as error:
        wire.send(Failed(type(error).__name__, str(error)))
        return 1
    loaded.forms.checked = True  # by the server, which is asked first
    loaded.forms.read_vocabulary()
    try:
        admission = loaded.engine.admission
        wire.send(
            Ready(
                model_name=loaded.model_name,
                device_name=loaded.device_name,
                tokenizer_folder=None if loaded.tokenizer is None else str(loaded.tokenizer.folder),
                vocab_size=admission.model.vocab_size,
                eos_token_ids=admission.model.eos_token_ids,
                limits=admission.limits,
                config=loaded.config,
            )
        )
        return EngineServer(wire, loaded, trace).serve()
    except OSError:  # the server is gone
        return 0
    finally:
        loaded.engine.close(5.0)


def main() -> None:
    """Ctrl-C is the server's to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = run(socket.socket(fileno=int(sys.argv[1])))
    sys.stderr.flush()
    os._exit(status)  # threads of libraries may hang; nothing is left to be written


if __name__ == "__main__":
    main()
