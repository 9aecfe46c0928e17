"""Invite and admit sites, replace their keys, and revoke them."""

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
from fedsigma.server.deployment.flower_control import FlowerControl, Node
from fedsigma.server.deployment.home import ServerHome, ServerHomeError

__all__ = ["Enrolment"]


class Enrolment:
    """The enrolment of a server's sites; each step is recorded in the audit log.

    Args:
        home: The server's folder.
        control: Its SuperLink; by default that of `home`.
    """

    def __init__(self, home: ServerHome, control: FlowerControl | None = None) -> None:
        self._home = home
        self._control = control or FlowerControl(home)
        self._database = ServerDatabase(home.path)
        self._log = ServerAuditLog(home.path)

    def invite(self, name: str, path: Path, *, days: int, note: str = "") -> Invitation:
        """Write an invitation, which replaces any earlier one of this site.

        Args:
            name: The site's name.
            path: A new file.
            days: Days that the invitation is valid.
            note: Contact at the site, for the server's own list.

        Raises:
            EnrolmentFileError: The name is invalid.
            ServerHomeError: The site has joined already; it replaces its keys with `fedsigma site rotate`.
            FileExistsError: The file exists.
        """
        check_site_name(name)
        if path.exists():
            raise FileExistsError(f"{path} exists: name another file")
        end = utc_now() + datetime.timedelta(days=days)
        word = secrets.token_hex(32)
        invitation = Invitation(
            site=name,
            server_name=self._home.config.name,
            address=self._home.config.address,
            certificates=self._home.tls("sites.crt").read_text(encoding="ascii"),
            word=word,
            expires=end.isoformat(),
        )
        with self._database.session() as session:
            site = session.get(Site, name)
            if site is None:
                site = Site(name=name, invited_at=utc_now())
                session.add(site)
            elif site.state == "joined":
                raise ServerHomeError(
                    f"site '{name}' has joined: it replaces its keys with `fedsigma site rotate`; to exclude"
                    " it, use `fedsigma server revoke`"
                )
            site.word, site.expires, site.note = word, end.isoformat(), note or site.note
            invitation.write(path)
        self._log.record("site_invited", site=name, expires=end.isoformat())
        return invitation

    def admit(self, keys: SiteKeys) -> NodeKey:
        """Admit a site with its first keys, or a joined site's new node key besides its old one.

        The node is registered at the SuperLink before the database is written. A crash in between leaves a
        registered node without an entry in the database, and `admit` can be called again.

        Raises:
            EnrolmentFileError: The keys match neither the site's invitation nor its identity.
            ServerHomeError: The site was not invited, or is revoked.
            ControlError: The SuperLink does not answer.
        """
        with self._database.session() as session:
            site = session.get(Site, keys.site)
            if site is None:
                raise ServerHomeError(
                    f"site '{keys.site}' was not invited: invite it with `fedsigma server invite {keys.site}`"
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
        """Revoke the old node keys of sites whose new node has been online; returns these keys.

        Raises:
            ControlError: The SuperLink does not answer.
        """
        nodes = self._control.nodes()
        online = {node.node_id for node in nodes.values() if node.status == "online"}
        retired = []
        with self._database.session() as session:
            for site in session.query(Site):
                if any(key.state == ACTIVE and key.node_id in online for key in site.keys):
                    retired += [key for key in site.keys if key.state == RETIRING]
            self._revoke_keys(retired, nodes)
        for key in retired:
            self._log.record("key_retired", site=key.site, node=key.node_id)
        return retired

    def revoke(self, name: str) -> list[NodeKey]:
        """Revoke all keys of a site; other sites are unaffected.

        Raises:
            ServerHomeError: The site does not exist.
            ControlError: The SuperLink does not answer; keys that were revoked before stay revoked.
        """
        with self._database.session() as session:
            site = session.get(Site, name)
            if site is None:
                raise ServerHomeError(f"there is no site '{name}': `fedsigma server sites` lists them")
            site.word = ""
            keys = [key for key in site.keys if key.state != REVOKED]
            self._revoke_keys(keys, self._control.nodes() if keys else {})
        self._log.record("site_revoked", site=name, nodes=[key.node_id for key in keys])
        return keys

    def sites(self) -> list[Site]:
        """Return all sites with their keys, by name."""
        return self._database.sites()

    def _check_first(self, site: Site, keys: SiteKeys) -> None:
        if not site.word:
            raise ServerHomeError(
                f"site '{site.name}' has no open invitation: invite it with"
                f" `fedsigma server invite {site.name}`"
            )
        if utc_now() >= datetime.datetime.fromisoformat(site.expires):
            raise EnrolmentFileError(
                f"the invitation of '{site.name}' expired on {site.expires}: send a new one"
            )
        keys.check(word=site.word)

    def _revoke_keys(self, keys: list[NodeKey], nodes: dict[str, Node]) -> None:
        for key in keys:
            if key.node_id in nodes and nodes[key.node_id].status != "unregistered":
                self._control.unregister(key.node_id)
            key.state = REVOKED
