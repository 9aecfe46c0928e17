"""The sites that take part: the handshake with each, and waiting until enough are ready."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from fedsigma.common.config.study import StudyConfig
from fedsigma.common.privacy.secure_aggregation import Member
from fedsigma.common.utils.errors import FedSigmaError
from fedsigma.common.wire.records import (
    HANDSHAKE,
    HANDSHAKE_PROBLEMS,
    PROTOCOL,
    HandshakeReply,
    HandshakeRequest,
    ProtocolError,
    StudySpec,
    from_record,
    protocol_version,
)

if TYPE_CHECKING:
    from fedsigma.common.sigma import Fingerprint
    from fedsigma.server.federation.messenger import Messenger, SiteReply
    from fedsigma.server.runs.run_dir import RunDir

__all__ = ["SiteManager", "TooFewSites", "WrongSiteCount"]

BUDGET_SPENT = "PrivacyBudgetSpent"
"""The error of a site whose privacy budget does not allow the round, or any later one."""
# The handshake with a refused site is repeated after this time: the cause may have been fixed. The wait
# doubles each time that a node does not answer at all, since a round starts only after the handshakes.
RETRY_S = 60.0
HANDSHAKE_S = 60.0
"""Seconds that a round waits for the handshake of a node that is new or did not answer before."""
POLL_S = 1.0
RETURN_S = 30.0
"""Seconds that a round waits for a site that went offline: its node may be restarting."""


class TooFewSites(FedSigmaError, RuntimeError):
    """Not enough sites were ready by the deadline."""


class WrongSiteCount(FedSigmaError, RuntimeError):
    """A simulation was started with another number of sites than its study has."""


class NodeDirectory(Protocol):
    """Knows which site each node belongs to."""

    def node_problem(self, node: int, name: str) -> str:
        """Why this node cannot be the site of this name; empty if it can."""
        ...


class SiteManager:
    """The sites whose fingerprint matches the study's.

    Args:
        messenger: Sends the handshakes.
        run_dir: Receives the events.
        study: The study.
        fingerprint: Of the server's backbone and basis.
        nodes: Which site each node belongs to; None where nodes are not registered, as in a simulation.

    Attributes:
        names: Name of each ready site, by node.
        members: The signed mask key of each site that has one, by node.
        allow_attribution: Names of the sites that finished models may name.
        allow_explanation: Names of the sites whose own shifts may be explained.
        without_budget: Nodes whose privacy budget is exhausted; they still evaluate.
    """

    def __init__(
        self,
        messenger: Messenger,
        run_dir: RunDir,
        study: StudyConfig,
        fingerprint: Fingerprint,
        nodes: NodeDirectory | None = None,
    ) -> None:
        self.names: dict[int, str] = {}
        self.members: dict[int, Member] = {}
        self.allow_attribution: set[str] = set()
        self.allow_explanation: set[str] = set()
        self.without_budget: set[int] = set()
        self.messenger, self.run_dir, self.study, self.fingerprint = messenger, run_dir, study, fingerprint
        self._nodes = nodes
        self._next_handshake: dict[int, float] = {}
        self._unanswered: dict[int, int] = {}  # how often in a row a node did not answer the handshake
        self._offline_since: dict[int, float] = {}
        self._reasons: dict[str, str] = {}
        self._sites = 0

    def available(self, patience: float = HANDSHAKE_S) -> dict[int, str]:
        """Handshake with new nodes, and return the sites that are online and ready.

        Args:
            patience: Seconds to wait for replies to the handshake.

        Returns:
            Name by node, sorted by name.
        """
        online = self.messenger.online()
        now = time.monotonic()
        new = [n for n in online if n not in self.names and self._next_handshake.get(n, 0.0) <= now]
        if new:
            self._handshake(sorted(new), online, patience)
        self._offline_since = {n: self._offline_since.get(n, now) for n in self.names if n not in online}
        by_name = sorted(self.names.items(), key=lambda item: item[1])
        return {node: name for node, name in by_name if node in online}

    def trainable(self, patience: float = HANDSHAKE_S) -> dict[int, str]:
        """The sites of `available` that still train."""
        return {n: name for n, name in self.available(patience).items() if n not in self.without_budget}

    def stop_training(self, node: int, *, round: int) -> None:
        """Send a site no more training tasks, from this round on."""
        self.without_budget.add(node)
        self.run_dir.log_event("site_budget_exhausted", round=round, site=self.names[node])

    def budgets_exhausted(self) -> bool:
        """Whether too few sites can still train, because their privacy budgets are exhausted."""
        return bool(self.without_budget) and len(self.trainable()) < self.study.federation.min_sites

    def wait_for_sites(self) -> dict[int, str]:
        """Wait until enough sites are ready: min_sites, and in a simulation all.

        A site that went offline a moment ago is waited for, too, so that a node that restarts loses no
        further round.

        Returns:
            Name by node, sorted by name.

        Raises:
            TooFewSites: They are not ready after the study's wait_for_sites_s.
            WrongSiteCount: A simulation has another number of sites than its study.
        """
        federation = self.study.federation
        deadline = time.monotonic() + federation.wait_for_sites_s
        # At the start of a study a site may first compute its basis, which takes minutes.
        patience = HANDSHAKE_S if self.names else federation.round_timeout_s
        while True:
            ready = self.trainable(patience)
            # A simulation's sites are all there at the start; one that was refused is left out.
            settled = len(ready) + len(self.without_budget) + len(self._reasons) >= self._sites
            over = time.monotonic() >= deadline
            if len(ready) >= federation.min_sites and settled and (over or not self._may_return()):
                return ready
            if over:
                refused = "; ".join(f"{name}: {reason}" for name, reason in sorted(self._reasons.items()))
                needed = (
                    f"at least {federation.min_sites} sites"
                    if len(ready) < federation.min_sites
                    else f"the simulation's {self._sites} sites"
                )
                raise TooFewSites(
                    f"{len(ready)} of {needed} were ready after {federation.wait_for_sites_s:g} s"
                    + (f" (refused: {refused})" if refused else "")
                )
            time.sleep(POLL_S)

    def _may_return(self) -> bool:
        """Whether a site went offline so recently that it may return."""
        recently = time.monotonic() - RETURN_S
        return any(
            since > recently for node, since in self._offline_since.items() if node not in self.without_budget
        )

    def _handshake(self, nodes: list[int], online: set[int], patience: float) -> None:
        request = HandshakeRequest(
            protocol=PROTOCOL, study=StudySpec.of(self.study), fingerprint=self.fingerprint.to_json()
        )
        timeout = min(patience, self.study.federation.round_timeout_s)
        for reply in self.messenger.send_tasks(nodes, request, kind=HANDSHAKE, timeout=timeout):
            unanswered = self._unanswered.get(reply.node, 0) + 1 if reply.timed_out else 0
            self._unanswered[reply.node] = unanswered
            self._next_handshake[reply.node] = time.monotonic() + RETRY_S * 2 ** min(unanswered, 10)
            self._check_reply(reply, online)

    def _check_reply(self, message: SiteReply, online: set[int]) -> None:
        """Accept a site, or record in one sentence why not."""
        node, name = message.node, f"node {message.node}"
        if message.content is None:
            return self._refuse(name, message.failure or "it did not answer the handshake in time")
        try:
            reply = from_record(HandshakeReply, message.content)
        except ProtocolError as error:
            # The reply of another version has other fields.
            reason = _version_mismatch(protocol_version(message.content))
            return self._refuse(name, reason or f"its reply to the handshake is invalid: {error}")
        if reply.problem == "site-count" or (reply.sites and len(online) != reply.sites):
            raise WrongSiteCount(
                f"study '{self.study.name}' has {reply.sites} sites, this federation has {len(online)}:"
                f" run it with --federation-config 'num-supernodes={reply.sites}'"
            )
        self._sites = max(self._sites, reply.sites)
        if reason := self._mismatch(reply) or self._name_conflict(node, reply.site, online):
            return self._refuse(reply.site, reason)
        self._reasons.pop(reply.site, None)
        self._reasons.pop(name, None)
        self.names[node] = reply.site
        if reply.allow_attribution:
            self.allow_attribution.add(reply.site)
        if reply.allow_explanation:
            self.allow_explanation.add(reply.site)
        else:  # its policy may have changed since the last handshake
            self.allow_explanation.discard(reply.site)
        if reply.mask_key:
            self.members[node] = Member(name=reply.site, key=reply.mask_key, signature=reply.mask_signature)
        self.run_dir.log_event("site_ready", site=reply.site, version=reply.version, **message.traces)
        return None

    def _mismatch(self, reply: HandshakeReply) -> str:
        """Why this site cannot take part; empty if it can."""
        from fedsigma.common.sigma import Fingerprint

        if reason := _version_mismatch(reply.protocol):
            return reason
        try:
            theirs = Fingerprint.from_json(reply.fingerprint)
        except (ValueError, RecursionError):
            return HANDSHAKE_PROBLEMS[reply.problem] or "the site's fingerprint cannot be parsed"
        mismatch = self.fingerprint.describe_mismatch(theirs) or HANDSHAKE_PROBLEMS[reply.problem]
        if not mismatch and self.study.federation.masking and not reply.mask_key:
            return "the study masks what sites send, and the site has no identity to sign its key with"
        return mismatch

    def _name_conflict(self, node: int, name: str, online: set[int]) -> str:
        if self._nodes is not None and (problem := self._nodes.node_problem(node, name)):
            return problem
        for other, other_name in list(self.names.items()):
            if other_name == name and other != node:
                if other in online:
                    return f"another site is already called '{name}'"
                del self.names[other]  # it returned with a new node id
        return ""

    def _refuse(self, name: str, reason: str) -> None:
        if self._reasons.get(name) != reason:
            self.run_dir.log_event("site_refused", site=name, reason=reason)
        self._reasons[name] = reason


def _version_mismatch(version: int | None) -> str:
    if version in (None, PROTOCOL):
        return ""
    return f"the site uses version {version} of the messages, the server version {PROTOCOL}"
