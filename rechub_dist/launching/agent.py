"""torchrun's elastic agent, one per host, with its own rules for restarts and exit codes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.agent.server.api import (
    DEFAULT_ROLE,
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig

from rechub_dist.distributed.process import (
    AGENT_PID,
    MISTAKE,
    PREEMPTED,
    STALLED,
    Requests,
    Terminal,
    preempted_exit_code,
    stop_signals,
)

_BEREFT_SECONDS = 5  # grace for workers whose peer has failed: they have nothing to save
_LOST = (RendezvousError, DistNetworkError, DistStoreError)  # raised when the rendezvous is lost
_EXIT_BARRIER_SECONDS = 30.0  # longest wait for the other agents at the end


class Agent(LocalElasticAgent):
    """Starts this host's workers, and restarts them after failures and membership changes.

    Differences from its base class:
    - a user's mistake (exit code 2) is not restarted;
    - workers that stopped on request have not failed: with a variable number of hosts they are restarted with the hosts
      that remain or joined, otherwise the command is done;
    - a second signal within a second counts as the first; a later one kills the workers at once, even hung ones.

    Workers get `grace_seconds` between SIGTERM and SIGKILL.
    """

    def __init__(self, spec: WorkerSpec, config: LaunchConfig, grace_seconds: int) -> None:
        assert config.logs_specs is not None
        super().__init__(spec, config.logs_specs, exit_barrier_timeout=_EXIT_BARRIER_SECONDS)
        self._shutdown_timeout = grace_seconds  # not an argument of the base class in torch 2.11
        self._hosts = (config.min_nodes, config.max_nodes)
        self._requests = Requests()
        self._signals = stop_signals()
        self._terminal = Terminal()
        self.preempted = False

    def listen(self) -> None:
        """Handle stop signals by raising a SignalException, which the base class forwards to the workers."""

        def end(number: int, _frame: object) -> None:
            self._terminal.leave_if_closed()
            request = self._requests.note()
            if request == 2:
                say(f"second {signal.Signals(number).name}: not waiting for the workers")
                self._kill_workers()
            if request:
                raise SignalException(f"agent {os.getpid()} was signalled", sigval=signal.Signals(number))

        for number in self._signals:
            signal.signal(number, end)

    def exit_codes(self) -> list[int | None]:
        """The workers' exit codes by local rank: negative for signals, None while running."""
        return [handler.proc.poll() for handler in self._handlers()]

    def _kill_workers(self) -> None:
        for handler in self._handlers():
            handler.close(signal.SIGKILL)

    def _handlers(self) -> list[SubprocessHandler]:
        context = self._pcontext
        return list(context.subprocess_handlers.values()) if isinstance(context, SubprocessContext) else []

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        try:
            return super()._invoke_run(role)
        except _LOST:
            # The remote agent may have ended for a reason that is about to end these workers, too.
            self._await_workers(_BEREFT_SECONDS)
            raise

    def _await_workers(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while None in self.exit_codes() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started = super()._start_workers(worker_group)
        self.listen()  # the base class has installed its own handlers
        return started

    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # noqa: ARG002
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int | None = None) -> None:
        if self._pcontext is not None:
            self._pcontext.close(death_sig, self._shutdown_timeout if timeout is None else timeout)
        super()._shutdown(death_sig)  # any left: torch 2.11 would give all workers 30 seconds

    def _exit_barrier(self) -> None:
        if not self.preempted:  # the other agents were signalled and do not arrive
            super()._exit_barrier()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ended = self._let_end()
        result = super()._monitor_workers(worker_group)
        if result.state is not WorkerState.FAILED:
            return result
        codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        if MISTAKE in codes.values():
            self._remaining_restarts = 0
        elif PREEMPTED in codes.values():
            return self._go_on(result)
        else:
            ended = ended or codes
            # Exit code 1 may just mean a lost connection to a failed peer: prefer any other as the cause.
            first = min(ended, key=lambda rank: (ended[rank] == 1, rank))
            used = worker_group.spec.max_restarts - self._remaining_restarts
            what = (
                f"restart {used + 1} of {worker_group.spec.max_restarts}"
                if self._remaining_restarts
                else "no restarts left"
            )
            say(f"rank {first} {_end_of(ended[first])}; {what}")
        return result

    def _let_end(self) -> dict[int, int]:
        """Once a worker has ended, end the others. The base class would signal even those that are about to save.

        Returns the exit codes, by global rank, of the workers that failed before any was ended here.
        """
        codes = self.exit_codes()
        failed = {w.global_rank: code for w, code in zip(self._worker_group.workers, codes, strict=False) if code}
        if PREEMPTED in codes:
            self._await_workers(self._shutdown_timeout)
        elif failed:
            self._shutdown(timeout=min(_BEREFT_SECONDS, self._shutdown_timeout))
        return failed

    def _go_on(self, preempted: RunResult) -> RunResult:
        """Decide how to continue when the workers stopped on request but this agent was not signalled."""
        low, high = self._hosts
        # Another agent may have stopped them for a joining host, which this agent has not seen yet.
        deadline = time.monotonic() + 2 + 2 * self._worker_group.spec.monitor_interval
        waiting = self._rdzv_handler.num_nodes_waiting
        while high > 1 and low == high and not waiting() and time.monotonic() < deadline:
            time.sleep(0.1)
        if low < high or waiting():
            say("hosts joined or left: resuming from the checkpoint")
            self._remaining_restarts += 1  # the base class counts it as a failure
            return preempted
        self.preempted = True
        ranks = [worker.global_rank for worker in self._worker_group.workers]
        return RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks))


def run_agent(config: LaunchConfig, entrypoint: str, arguments: list[str], grace_seconds: int) -> int:
    """Run an agent until the run ends or a signal arrives; returns the command's exit code.

    0: finished. `preempted_exit_code()`: stopped on request. 2: a user's mistake, which the worker has printed.
    128 + n: the workers did not end in time after signal n. Otherwise 1, or the code of the worker that failed first.
    """
    # torch would print a page about a worker whose error is already on stderr.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ[AGENT_PID] = str(os.getpid())
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in stop_signals())
    parameters = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    try:
        rendezvous = get_rendezvous_handler(parameters)
    except RendezvousError as error:
        say(f"cannot reach the rendezvous at {config.rdzv_endpoint}: {error.__cause__ or error}")
        return 1
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=entrypoint,
        args=tuple(arguments),
        rdzv_handler=rendezvous,
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        local_addr=config.local_addr,
    )
    agent = Agent(spec, config, grace_seconds)
    try:
        agent.listen()
        result = agent.run()
    except SignalException as asked:
        codes = agent.exit_codes()
        # A worker that has not begun training dies of the signal and loses nothing; there may be no workers yet. The
        # rendezvous stays open: the other hosts may continue.
        followed = all(code in (0, PREEMPTED, -asked.sigval) for code in codes)
        if followed and PREEMPTED not in codes and (-asked.sigval in codes or not codes):
            say("stopped before training began, resume with the same command")
        done = bool(codes) and not any(codes)
        return (0 if done else preempted_exit_code()) if followed else 128 + asked.sigval
    except _LOST as error:
        code = _without_rendezvous(agent.exit_codes())
        if code == 1:
            say(f"lost the rendezvous at {config.rdzv_endpoint}: {error}")
        return code
    rendezvous.shutdown()
    if not result.is_failed():
        return preempted_exit_code() if agent.preempted else 0
    failed = [failure.exitcode for failure in result.failures.values()]
    return MISTAKE if MISTAKE in failed else next((code for code in failed if code > 0), 1)


def _without_rendezvous(codes: list[int | None]) -> int:
    """The command's exit code, from those of the workers, when the rendezvous host ended first."""
    if MISTAKE in codes:
        return MISTAKE
    return preempted_exit_code() if codes and all(code in (0, PREEMPTED) for code in codes) else 1


def say(message: str) -> None:
    """Print a line from this host's agent to stderr."""
    print(f"agent of {socket.gethostname()}: {message}", file=sys.stderr, flush=True)


def _end_of(code: int) -> str:
    if code == STALLED:
        return "was ended by its watchdog"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
