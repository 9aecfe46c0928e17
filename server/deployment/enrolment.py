"""Inviting sites, letting them in, replacing their keys and shutting them out."""

from __future__ import annotations

import datetime
import secrets
from pathlib import Path

from fedsigma.common.ops.enrolment_files import EnrolmentFileError, Invitation, SiteKeys, check_site_name
from fedsigma.server.deployment.audit_log import ServerAuditLog
from fedsigma.server.deployment.database import (
    ACTIVE,
    RETIRING,
    REVOKED,
    NodeKey,
    ServerDatabase,
    Site,
    utc_now,
)
from fedsigma.server.deployment.flower_control import FlowerControl
from fedsigma.server.deployment.home import ServerHome, ServerHomeError

__all__ = ["Enrolment"]


class Enrolment:
    """What the server does with its sites; each step is a line of the audit log.

    Args:
        folder: the server's.
        control: how its SuperLink is reached.
    """

    def __init__(self, folder: ServerHome, control: FlowerControl | None = None) -> None:
        self._folder = folder
        self._control = control or FlowerControl(folder)
        self._registry = ServerDatabase(folder.path / "server.db")
        self._log = ServerAuditLog(folder.path)

    def invite(self, name: str, path: Path, *, days: int, note: str = "") -> Invitation:
        """Write an invitation; an earlier one of this site is void from now on.

        Args:
            name: of the site.
            path: of a new file.
            days: how long the invitation is valid.
            note: whom to call there, for the server's own list.

        Raises:
            JoinError: the name does not do.
            ServerError: the site has joined; its keys are replaced by `fedsigma site rotate`.
            FileExistsError: there is such a file.
        """
        check_site_name(name)
        if path.exists():
            raise FileExistsError(f"{path} exists: name another file")
        end = utc_now() + datetime.timedelta(days=days)
        word = secrets.token_hex(32)
        invitation = Invitation(
            site=name,
            server_name=self._folder.config.name,
            address=self._folder.config.address,
            certificates=self._folder.tls("sites.crt").read_text(encoding="ascii"),
            word=word,
            expires=end.isoformat(),
        )
        with self._registry.session() as session:
            site = session.get(Site, name)
            if site is None:
                site = Site(name=name, invited_at=utc_now())
                session.add(site)
            elif site.state == "joined":
                raise ServerHomeError(
                    f"site '{name}' has joined: it replaces its keys by `fedsigma site rotate`, and"
                    " `fedsigma server revoke` shuts it out"
                )
            site.word, site.expires, site.note = word, end.isoformat(), note or site.note
            invitation.write(path)
        self._log.record("site_invited", site=name, expires=end.isoformat())
        return invitation

    def admit(self, keys: SiteKeys) -> NodeKey:
        """Let a site in with its first keys, or a joined site's new node key beside its old one.

        The SuperLink is asked first and the database written afterwards, so what a crash leaves is a node
        that nobody has the key of in the list, and `admit` can be called again.

        Raises:
            JoinError: the keys do not belong to the site's invitation, or to its identity.
            ServerError: the site was not invited, or is shut out.
            ControlError: the SuperLink does not answer.
        """
        with self._registry.session() as session:
            site = session.get(Site, keys.site)
            if site is None:
                raise ServerHomeError(
                    f"site '{keys.site}' was not invited: `fedsigma server invite {keys.site}`"
                )
            renewed = site.state == "joined"
            if renewed:
                keys.check(word=None, identity=site.identity)
            else:
                self._check_first(site, keys)
            if any(key.public_key == keys.node_key for key in site.keys):
                raise ServerHomeError(f"site '{keys.site}' has joined with this key already")
            for key in site.keys:
                if key.state == ACTIVE:
                    key.state = RETIRING
            node = self._control.register(keys.node_key)
            added = NodeKey(node_id=node, site=site.name, public_key=keys.node_key, added_at=utc_now())
            session.add(added)
            site.identity, site.word = keys.identity, ""
        self._log.record("site_admitted", site=keys.site, node=node, identity=keys.identity, renewed=renewed)
        return added

    def retire_old_keys(self) -> list[NodeKey]:
        """Shut out the old node keys of sites whose new node has been seen; returns those keys.

        Raises:
            ControlError: the SuperLink does not answer.
        """
        nodes = self._control.nodes()
        done = []
        with self._registry.session() as session:
            for site in session.query(Site):
                seen = [k for k in site.keys if k.state == ACTIVE and self._online(nodes, k)]
                for key in [k for k in site.keys if k.state == RETIRING] if seen else []:
                    self._shut_out(key)
                    done.append(key)
        for key in done:
            self._log.record("key_retired", site=key.site, node=key.node_id)
        return done

    def revoke(self, name: str) -> list[NodeKey]:
        """Shut a site out, with all its keys; other sites are not touched.

        Raises:
            ServerError: there is no such site.
            ControlError: the SuperLink does not answer; keys that it refused already stay shut out.
        """
        with self._registry.session() as session:
            site = session.get(Site, name)
            if site is None:
                raise ServerHomeError(f"there is no site '{name}': `fedsigma server sites` lists them")
            site.word = ""
            keys = [key for key in site.keys if key.state != REVOKED]
            for key in keys:
                self._shut_out(key)
        self._log.record("site_revoked", site=name, nodes=[key.node_id for key in keys])
        return keys

    def sites(self) -> list[Site]:
        """All sites with their keys, by name."""
        return self._registry.sites()

    def site_of_node(self) -> dict[str, str]:
        """The site of each node number that is let in."""
        return {k.node_id: s.name for s in self.sites() for k in s.keys if k.state != REVOKED}

    def _check_first(self, site: Site, keys: SiteKeys) -> None:
        if not site.word:
            raise ServerHomeError(
                f"site '{site.name}' has no open invitation: `fedsigma server invite {site.name}`"
            )
        if utc_now() >= datetime.datetime.fromisoformat(site.expires):
            raise EnrolmentFileError(
                f"the invitation of '{site.name}' expired on {site.expires}: send a new one"
            )
        keys.check(word=site.word)

    def _shut_out(self, key: NodeKey) -> None:
        nodes = self._control.nodes()
        if key.node_id in nodes and nodes[key.node_id].status != "unregistered":
            self._control.unregister(key.node_id)
        key.state = REVOKED

    @staticmethod
    def _online(nodes: dict, key: NodeKey) -> bool:
        return key.node_id in nodes and nodes[key.node_id].status == "online"
