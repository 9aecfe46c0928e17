"""Who takes part: the handshake with each site, and waiting until enough sites are there."""

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
"""What a site answers whose privacy budget does not allow the round, or any later one."""
# A site that was refused is asked again after this time: its people may have put it right. One that does not
# answer at all keeps a round from beginning for so long, and twice as long after each time that it did.
RETRY_S = 60.0
HANDSHAKE_S = 60.0
"""How long a round waits for the handshake of a site that is new, or did not answer before."""
POLL_S = 1.0
RETURN_S = 30.0
"""How long a round waits for a site that was there and went away: its node may have been started again."""


class TooFewSites(FedSigmaError, RuntimeError):
    """Not enough sites were there by the deadline."""


class WrongSiteCount(FedSigmaError, RuntimeError):
    """A simulation was started with another number of sites than its study has."""


class NodeDirectory(Protocol):
    """Knows which site each node belongs to."""

    def problem(self, node: int, name: str) -> str:
        """Why this node cannot be the site of this name; empty if it can."""
        ...


class SiteManager:
    """The sites that have shown the study's fingerprint, by node id."""

    def __init__(
        self,
        exchange: Messenger,
        folder: RunDir,
        study: StudyConfig,
        fingerprint: Fingerprint,
        nodes: NodeDirectory | None = None,
    ) -> None:
        self.names: dict[int, str] = {}
        self.members: dict[int, Member] = {}
        """The signed mask key of each site that has one."""
        self.allow_attribution: set[str] = set()
        """The sites that finished models may name."""
        self.allow_explanation: set[str] = set()
        """The sites of whose own shifts it may be said in words what they changed."""
        self.without_budget: set[int] = set()
        """The sites that train no more, for their privacy budgets are spent; they still evaluate."""
        self.messenger, self.run_dir, self.study, self.fingerprint = exchange, folder, study, fingerprint
        self._nodes = nodes
        self._next_handshake: dict[int, float] = {}
        self._unanswered: dict[int, int] = {}
        """How often in a row a node did not answer the handshake."""
        self._offline_since: dict[int, float] = {}
        self._reasons: dict[str, str] = {}
        self._sites = 0

    def available(self, patience: float = HANDSHAKE_S) -> dict[int, str]:
        """Greet whoever is new and return the sites that are online and ready, node id -> name, by name.

        Args:
            patience: for how many seconds answers to the handshake are waited for.
        """
        online = self.messenger.online()
        now = time.monotonic()
        new = [n for n in online if n not in self.names and self._next_handshake.get(n, 0.0) <= now]
        if new:
            self._handshake(sorted(new), online, patience)
        ready = [node for node in self.names if node in online]
        self._offline_since = {n: self._offline_since.get(n, now) for n in self.names if n not in online}
        return {node: self.names[node] for node in sorted(ready, key=lambda node: self.names[node])}

    def trainable(self, patience: float = HANDSHAKE_S) -> dict[int, str]:
        """The sites of `present` that still train."""
        return {
            node: name for node, name in self.available(patience).items() if node not in self.without_budget
        }

    def stop_training(self, node: int, *, round: int) -> None:
        """Ask a site for no more training, from this round on."""
        self.without_budget.add(node)
        self.run_dir.log_event("site_budget_exhausted", round=round, site=self.names[node])

    def budgets_exhausted(self) -> bool:
        """Whether too few sites can still train, because their privacy budgets are exhausted."""
        return bool(self.without_budget) and len(self.trainable()) < self.study.federation.min_sites

    def wait_for_sites(self) -> dict[int, str]:
        """Wait until enough sites are ready: min_sites, and in a simulation all.

        A site that was there a moment ago is waited for, too, so that a node that is started again costs its
        site no further round.

        Raises:
            TooFewSites: they are not there after the study's wait_for_sites_s.
            WrongSiteCount: a simulation has another number of sites than its study.
        """
        federation = self.study.federation
        deadline = time.monotonic() + federation.wait_for_sites_s
        # At the start of a study a site may have a basis to compute, which takes minutes.
        patience = HANDSHAKE_S if self.names else federation.round_timeout_s
        while True:
            ready = self.trainable(patience)
            # A simulation's sites cannot come later; one that was refused there is left out.
            settled = len(ready) + len(self.without_budget) + len(self._reasons) >= self._sites
            over = time.monotonic() >= deadline
            if len(ready) >= federation.min_sites and settled and (over or not self._may_return()):
                return ready
            if over:
                refused = "; ".join(f"{name}: {reason}" for name, reason in sorted(self._reasons.items()))
                wanted = (
                    f"at least {federation.min_sites} sites"
                    if len(ready) < federation.min_sites
                    else f"the simulation's {self._sites} sites"
                )
                raise TooFewSites(
                    f"{len(ready)} of {wanted} were ready after {federation.wait_for_sites_s:g} s"
                    + (f" (refused: {refused})" if refused else "")
                )
            time.sleep(POLL_S)

    def _may_return(self) -> bool:
        """Whether a site may come back any moment."""
        recently = time.monotonic() - RETURN_S
        return any(
            since > recently for node, since in self._offline_since.items() if node not in self.without_budget
        )

    def _handshake(self, nodes: list[int], online: set[int], patience: float) -> None:
        hello = HandshakeRequest(
            protocol=PROTOCOL, study=StudySpec.of(self.study), fingerprint=self.fingerprint.to_json()
        )
        timeout = min(patience, self.study.federation.round_timeout_s)
        for answer in self.messenger.send_tasks(dict.fromkeys(nodes, hello), kind=HANDSHAKE, timeout=timeout):
            silent = self._unanswered.get(answer.node, 0) + 1 if answer.timed_out else 0
            self._unanswered[answer.node] = silent
            self._next_handshake[answer.node] = time.monotonic() + RETRY_S * 2 ** min(silent, 10)
            self._check_reply(answer.node, answer, online)

    def _check_reply(self, node: int, answer: SiteReply, online: set[int]) -> None:
        """Take a site in, or record in one sentence why not."""
        name = f"node {node}"
        try:
            if answer.content is None:
                return self._refuse(name, answer.failure or "it did not answer the handshake in time")
            reply = from_record(HandshakeReply, answer.content)
        except ProtocolError as error:
            # Another version's answer has other fields.
            reason = _version_mismatch(protocol_version(answer.content)) if answer.content is not None else ""
            return self._refuse(name, reason or f"its answer to the handshake is not valid: {error}")
        if reply.problem == "site-count" or (reply.sites and len(online) != reply.sites):
            raise WrongSiteCount(
                f"study '{self.study.name}' has {reply.sites} sites, this federation has {len(online)}:"
                f" run it with --federation-config 'num-supernodes={reply.sites}'"
            )
        self._sites = max(self._sites, reply.sites)
        reason = self._mismatch(reply) or self._name_conflict(node, reply.site, online)
        if reason:
            return self._refuse(reply.site, reason)
        self._reasons.pop(reply.site, None)
        self._reasons.pop(name, None)
        self.names[node] = reply.site
        if reply.allow_attribution:
            self.allow_attribution.add(reply.site)
        if reply.allow_explanation:
            self.allow_explanation.add(reply.site)
        else:  # it may have changed its mind since it was here last
            self.allow_explanation.discard(reply.site)
        if reply.mask_key:
            self.members[node] = Member(name=reply.site, key=reply.mask_key, signature=reply.mask_signature)
        self.run_dir.log_event("site_ready", site=reply.site, version=reply.version, **answer.traces)
        return None

    def _mismatch(self, reply: HandshakeReply) -> str:
        """Say why this site cannot take part; empty if it can."""
        from fedsigma.common.sigma import Fingerprint

        if reason := _version_mismatch(reply.protocol):
            return reason
        try:
            theirs = Fingerprint.from_json(reply.fingerprint)
        except (ValueError, RecursionError):
            return HANDSHAKE_PROBLEMS[reply.problem] or "the site's fingerprint does not read"
        difference = self.fingerprint.describe_mismatch(theirs) or HANDSHAKE_PROBLEMS[reply.problem]
        if not difference and self.study.federation.masking and not reply.mask_key:
            return "the study masks what sites send, and the site has no identity to sign its key with"
        return difference

    def _name_conflict(self, node: int, name: str, online: set[int]) -> str:
        if self._nodes is not None and (problem := self._nodes.problem(node, name)):
            return problem
        for other, known in list(self.names.items()):
            if known == name and other != node:
                if other in online:
                    return f"another site is already called '{name}'"
                del self.names[other]  # it came back under a new node id
        return ""

    def _refuse(self, name: str, reason: str) -> None:
        if self._reasons.get(name) != reason:
            self.run_dir.log_event("site_refused", site=name, reason=reason)
        self._reasons[name] = reason


def _version_mismatch(spoken: int | None) -> str:
    if spoken in (None, PROTOCOL):
        return ""
    return f"the site speaks version {spoken} of the messages, the server {PROTOCOL}"
