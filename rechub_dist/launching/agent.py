"""torchrun's agent, one a host, with rules of its own about what is restarted and what the command exits with."""

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

_BEREFT_SECONDS = 5  # for workers that a peer's failure leaves behind: they have nothing to save
_LOST = (RendezvousError, DistNetworkError, DistStoreError)  # what a rendezvous that is gone raises
_EXIT_BARRIER_SECONDS = 30.0  # an agent that has ended otherwise is not waited for longer


class Agent(LocalElasticAgent):
    """Starts this host's workers, and again after a failure or when hosts come and go.

    It differs from its base in that
    - a user's mistake (exit code 2) is not restarted;
    - workers that were asked to stop have not failed: they go on with the hosts that are left or have come, where the
      number of hosts may vary, else the command is done;
    - a second signal that comes with the first is part of it, and a later one ends the workers at once, hung ones too.

    Workers have `grace_seconds` from a request to stop to SIGKILL.
    """

    def __init__(self, spec: WorkerSpec, config: LaunchConfig, grace_seconds: int) -> None:
        assert config.logs_specs is not None
        super().__init__(spec, config.logs_specs, exit_barrier_timeout=_EXIT_BARRIER_SECONDS)
        self._shutdown_timeout = grace_seconds  # which the base class of torch 2.11 does not take
        self._hosts = (config.min_nodes, config.max_nodes)
        self._requests = Requests()
        self._signals = stop_signals()
        self._terminal = Terminal()
        self.preempted = False

    def listen(self) -> None:
        """Turn requests to stop into a SignalException, which the base class passes on to the workers."""

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
        """The workers' exit codes, negative for signals, None while they run."""
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
            # The agent there may have ended for a reason for which these workers are about to end, too.
            self._await_workers(_BEREFT_SECONDS)
            raise

    def _await_workers(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while None in self.exit_codes() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started = super()._start_workers(worker_group)
        self.listen()  # the base class has put its own handlers in
        return started

    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # noqa: ARG002
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int | None = None) -> None:
        if self._pcontext is not None:
            self._pcontext.close(death_sig, self._shutdown_timeout if timeout is None else timeout)
        super()._shutdown(death_sig)  # what is left: torch 2.11 would give all workers 30 seconds

    def _exit_barrier(self) -> None:
        if not self.preempted:  # the other agents have been signalled, and do not come
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
            # A peer's lost connection is exit code 1: of those that have ended together, it has not begun.
            first = min(ended, key=lambda rank: (ended[rank] == 1, rank))
            used = worker_group.spec.max_restarts - self._remaining_restarts
            what = (
                f"restart {used + 1} of {worker_group.spec.max_restarts}"
                if self._remaining_restarts
                else "no restart is left"
            )
            say(f"rank {first} {_end_of(ended[first])}; {what}")
        return result

    def _let_end(self) -> dict[int, int]:
        """Once a worker has ended, end the others: the base class would signal those that are about to save.

        Returns the exit codes by rank of the workers that failed before any was ended here.
        """
        codes = self.exit_codes()
        failed = {w.global_rank: code for w, code in zip(self._worker_group.workers, codes, strict=False) if code}
        if PREEMPTED in codes:
            self._await_workers(self._shutdown_timeout)
        elif failed:
            self._shutdown(timeout=min(_BEREFT_SECONDS, self._shutdown_timeout))
        return failed

    def _go_on(self, preempted: RunResult) -> RunResult:
        """What follows when the workers have stopped as they were asked to, this agent not."""
        low, high = self._hosts
        # Another agent may have stopped them for a host that has come, which this one has not seen yet.
        deadline = time.monotonic() + 2 + 2 * self._worker_group.spec.monitor_interval
        waiting = self._rdzv_handler.num_nodes_waiting
        while high > 1 and low == high and not waiting() and time.monotonic() < deadline:
            time.sleep(0.1)
        if low < high or waiting():
            say("hosts have come or gone: going on from the checkpoint")
            self._remaining_restarts += 1  # the base class takes it for a failure
            return preempted
        self.preempted = True
        ranks = [worker.global_rank for worker in self._worker_group.workers]
        return RunResult(WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks))


def run_agent(config: LaunchConfig, entrypoint: str, arguments: list[str], grace_seconds: int) -> int:
    """Run an agent to the end of the run, or to a signal; returns the command's exit code.

    That is 0 for a run that is done, `preempted_exit_code()` for one that has stopped as it was asked to, 2 for a
    user's mistake (which the worker has told), 128 + n where a signal n was not followed in time, else 1 or the code of
    the worker that failed first.
    """
    # It would print a page about a worker that has said all there is to say.
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
        say(f"no rendezvous at {config.rdzv_endpoint}: {error.__cause__ or error}")
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
        # A worker that has not begun to train ends by the signal itself, and loses nothing; there may be none yet, too.
        # The rendezvous stays open: the other hosts may go on.
        followed = all(code in (0, PREEMPTED, -asked.sigval) for code in codes)
        if followed and PREEMPTED not in codes and (-asked.sigval in codes or not codes):
            say("stopped before a checkpoint was due, resume with the same command")
        done = bool(codes) and not any(codes)
        return (0 if done else preempted_exit_code()) if followed else 128 + asked.sigval
    except _LOST as error:
        code = _without_rendezvous(agent.exit_codes())
        if code == 1:
            say(f"the rendezvous at {config.rdzv_endpoint} is lost: {error}")
        return code
    rendezvous.shutdown()
    if not result.is_failed():
        return preempted_exit_code() if agent.preempted else 0
    failed = [failure.exitcode for failure in result.failures.values()]
    return MISTAKE if MISTAKE in failed else next((code for code in failed if code > 0), 1)


def _without_rendezvous(codes: list[int | None]) -> int:
    """The command's exit code, given the workers', when the host of the rendezvous has ended first."""
    if MISTAKE in codes:
        return MISTAKE
    return preempted_exit_code() if codes and all(code in (0, PREEMPTED) for code in codes) else 1


def say(message: str) -> None:
    """A line of this host's agent, on stderr."""
    print(f"agent of {socket.gethostname()}: {message}", file=sys.stderr, flush=True)


def _end_of(code: int) -> str:
    if code == STALLED:
        return "was ended by its watchdog"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
