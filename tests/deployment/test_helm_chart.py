"""The chart in deploy/helm: linted and rendered by Helm's own library, and read for what it means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsigma.client.deployment.home import Connection
from fedsigma.client.site.policy import SitePolicy
from fedsigma.common.config.schema import build, split_address
from fedsigma.server.dashboard.config import DashboardConfig
from tests.helpers.deploy_files import DEPLOY, FOLDERS, UID, parse, passes, process_of, tool

helm = pytest.importorskip("helm_python", reason="helm-python-sdk has no build for this machine")

CHART = DEPLOY / "helm" / "fedsigma"
IMAGES = {"persistentVolumeClaim": {"claimName": "images", "readOnly": True}}
ADDRESS = "fl.example.org:8443"
SITE = {"enabled": True, "name": "north", "serverName": "C", "address": ADDRESS, "images": IMAGES}
SERVER = {"enabled": True, "address": "fl.example.org:443"}
GPU = {"image": "fedsigma-site:0.1.0-cu130", "resources": {"worker": {"limits": {"nvidia.com/gpu": 1}}}}
SHOWN = {
    "enabled": True,
    "origins": ["https://dash.example.org"],
    "tlsSecret": "dash-tls",
    "egress": {"cidrs": ["192.0.2.9/32"]},
}
BEHIND = {"enabled": True, "origins": ["https://dash.example.org"], "proxies": ["10.0.0.0/8"]}
VALUES: dict[str, dict[str, Any]] = {
    "site": {"site": SITE},
    "server": {"server": SERVER},
    "dashboard": {"server": {**SERVER, "dashboard": SHOWN}},
    "behind": {"server": {**SERVER, "dashboard": {**BEHIND, "from": [{"podSelector": {}}]}}},
    "both": {"site": SITE, "server": SERVER},
    "gpu": {"site": {**SITE, **GPU, "weights": {"nfs": {"server": "nas", "path": "/weights"}}}},
    "claims": {"site": {**SITE, "storage": {"existingClaim": "one"}, "httpsProxy": "http://p:3128"}},
}
# What the chart says it needs, and the newest whose schemas are at hand.
VERSIONS = ("1.27", "")
WORKLOADS = ("Deployment", "StatefulSet")


def render(values: dict[str, Any], release: str = "demo") -> list[dict[str, Any]]:
    """All objects, as Helm would hand them to Kubernetes."""
    with helm.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name=release, namespace="fl")
    texts = [text for name, text in sorted(files.items()) if not name.endswith("NOTES.txt")]
    return [one for text in texts for one in yaml.safe_load_all(text) if one]


def named(objects: list[dict[str, Any]], kind: str, end: str) -> dict[str, Any]:
    (found,) = (o for o in objects if o["kind"] == kind and o["metadata"]["name"].endswith(end))
    return found


def pod_of(objects: list[dict[str, Any]], end: str) -> dict[str, Any]:
    (found,) = (o for o in objects if o["kind"] in WORKLOADS and o["metadata"]["name"].endswith(end))
    return found["spec"]["template"]


def containers(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pods = [one["spec"]["template"]["spec"] for one in objects if one["kind"] in WORKLOADS]
    return [one for pod in pods for one in [*pod.get("initContainers", []), *pod["containers"]]]


def test_helm_finds_no_fault() -> None:
    found = helm.lint(str(CHART))
    worse = [one for one in found["messages"] if "icon is recommended" not in one["error"]]
    assert not worse and not found["errors"]
    for name in ("Chart.yaml", "values.yaml"):
        passes(tool("yamllint"), "-d", "{extends: relaxed, rules: {line-length: {max: 120}}}", CHART / name)


@pytest.mark.parametrize("name", VALUES)
def test_kubernetes_takes_what_is_rendered(name: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    for version in VERSIONS:
        for one in render(VALUES[name]):
            schemas.validate(one, version or schemas.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"site": {"enabled": True}}, "site.name"),
        ({"site": {**SITE, "images": {}}}, "site.images"),
        ({"server": {"enabled": True}}, "server.address"),
        ({"site": {**SITE, "address": "fl.example.org"}}, "/site/address"),
        ({"site": {**SITE, "rules": {"bundles": ["latest"]}}}, "/site/rules/bundles/0"),
        ({"site": {**SITE, "rules": {"name": "south"}}}, "/site/rules"),
        ({"server": {**SERVER, "replicas": 2}}, "replicas"),
        ({"server": {**SERVER, "dashboard": {"enabled": True}}}, "server.dashboard.origins"),
        ({"server": {**SERVER, "dashboard": {**BEHIND, "proxies": []}}}, "tlsSecret"),
        ({"server": {**SERVER, "dashboard": {**BEHIND, "origins": ["http://a"]}}}, "dashboard/origins/0"),
    ],
)
def test_invalid_values_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(helm.HelmError, match=words):
        render(values)


def test_nothing_is_installed_that_was_not_asked_for() -> None:
    assert render({}) == []


@pytest.mark.parametrize("name", ["both", "dashboard"])
def test_pods_keep_to_the_restricted_profile_and_more(name: str) -> None:
    objects = render(VALUES[name])
    for one in (o for o in objects if o["kind"] in WORKLOADS):
        spec = one["spec"]["template"]["spec"]
        said = spec["securityContext"]
        assert said["runAsNonRoot"] is True and said["runAsUser"] == said["fsGroup"] == UID
        assert said["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False and one["spec"]["replicas"] == 1
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert not any("hostPath" in volume for volume in spec["volumes"])
    for one in containers(objects):
        said = one["securityContext"]
        assert said["allowPrivilegeEscalation"] is False and said["readOnlyRootFilesystem"] is True
        assert said["capabilities"] == {"drop": ["ALL"]} and "privileged" not in said
        assert one["resources"]["limits"]["memory"] and one["resources"]["requests"]["cpu"]
        assert {"name": "tmp", "mountPath": "/tmp"} in one["volumeMounts"]


def test_every_container_is_a_command_and_is_asked_for_its_health() -> None:
    objects = render(VALUES["both"])
    _, options = parse(next(one for one in containers(objects) if one["name"] == "init")["args"])
    assert options["if_new"] and str(options["folder"]) == FOLDERS["server"]
    told = yaml.safe_load(named(objects, "ConfigMap", "-site")["data"]["connection.yaml"])
    health = {
        "server superlink": options["health"],
        "server worker": options["worker_health"],
        "site node": told["node_health"],
        "site worker": told["worker_health"],
    }
    seen = set()
    for one in (one for one in containers(objects) if one["name"] != "init"):
        process = process_of(one["args"])
        seen.add(process)
        if process == "server proxy":
            _, *words = one["readinessProbe"]["exec"]["command"]
            status, asked = parse(words)
            assert status == "server status" and asked["only"] == "proxy"
            assert str(one["ports"][0]["containerPort"]) == options["listen"].split(":")[1]
            continue
        if process == "server auto-resume":
            assert not any(name.endswith("Probe") for name in one)
            continue
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            # The kubelet asks at the pod's address.
            assert split_address(health[process], where=process) == ("0.0.0.0", one[probe]["grpc"]["port"])
    assert seen == {*health, "server auto-resume", "server proxy"}


def test_the_superlink_listens_to_its_own_pod_alone() -> None:
    objects = render(VALUES["server"])
    _, options = parse(next(one for one in containers(objects) if one["name"] == "init")["args"])
    assert options["superlink"].startswith("127.0.0.1:")
    (service,) = (o for o in objects if o["kind"] == "Service")
    assert [port["targetPort"] for port in service["spec"]["ports"]] == ["sites"]
    policy = named(objects, "NetworkPolicy", "-server")["spec"]
    assert policy["ingress"] == [{"ports": [{"protocol": "TCP", "port": 8443}]}] and policy["egress"] == []
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    proxy = next(one for one in containers(objects) if one["name"] == "proxy")
    paths = {mount.get("subPath", "") for mount in proxy["volumeMounts"] if mount["name"] == "folder"}
    assert "" not in paths and not {"server", "server/tls", "server/secrets", "server/tls/ca.key"} & paths


def test_the_dashboard_is_not_there_unless_it_is_asked_for() -> None:
    text = yaml.safe_dump_all(render(VALUES["server"]))
    assert "dashboard" not in text and "8050" not in text and "publishNotReady" not in text


@pytest.mark.parametrize(("name", "scheme"), [("dashboard", "HTTPS"), ("behind", "HTTP")])
def test_the_dashboard_is_a_process_that_is_asked_by_its_page(name: str, scheme: str) -> None:
    objects = render(VALUES[name])
    by_name = {one["name"]: one for one in containers(objects)}
    one = by_name["dashboard"]
    assert process_of(one["args"]) == "server dashboard"
    (port,) = one["ports"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert one[probe]["httpGet"] == {"path": "/health", "port": port["name"], "scheme": scheme}
    # The file that is put into the server's folder is one that the dashboard reads, and says that port.
    told = named(objects, "ConfigMap", "-dashboard")["data"]["dashboard.yaml"]
    config = build(DashboardConfig, yaml.safe_load(told), where="dashboard.yaml")
    assert split_address(config.listen, where="listen") == ("0.0.0.0", port["containerPort"])
    assert bool(config.certificate) == (scheme == "HTTPS")
    mounts = {mount["mountPath"]: mount["name"] for mount in one["volumeMounts"]}
    assert not config.certificate or str(Path(config.certificate).parent) in mounts
    _, source, target = by_name["dashboard-file"]["command"]
    (mounted,) = (m for m in by_name["dashboard-file"]["volumeMounts"] if source.startswith(m["mountPath"]))
    assert mounted["name"] == "dashboard" and target == f"{FOLDERS['server']}/dashboard.yaml"


def test_stopped_dashboard_does_not_block_the_server() -> None:
    services = {
        o["metadata"]["name"]: o["spec"] for o in render(VALUES["dashboard"]) if o["kind"] == "Service"
    }
    assert set(services) == {"demo-server", "demo-dashboard"}
    # Else its pod, which is not ready while one container is down, would get no site's requests.
    assert services["demo-server"]["publishNotReadyAddresses"] is True
    assert "publishNotReadyAddresses" not in services["demo-dashboard"]
    assert [port["targetPort"] for port in services["demo-server"]["ports"]] == ["sites"]
    assert [port["targetPort"] for port in services["demo-dashboard"]["ports"]] == ["dashboard"]


def test_the_dashboard_opens_its_port_and_a_way_to_the_provider_alone() -> None:
    policy = named(render(VALUES["dashboard"]), "NetworkPolicy", "-server")["spec"]
    assert [rule["ports"][0]["port"] for rule in policy["ingress"]] == [8443, 8050]
    out, names = policy["egress"]
    assert out == {
        "to": [{"ipBlock": {"cidr": "192.0.2.9/32"}}],
        "ports": [{"protocol": "TCP", "port": 443}],
    }
    assert {port["port"] for port in names["ports"]} == {53} and names["to"]
    policy = named(render(VALUES["behind"]), "NetworkPolicy", "-server")["spec"]
    assert policy["ingress"][1]["from"] == [{"podSelector": {}}] and policy["egress"] == []


def test_the_dashboard_sees_no_secret_of_the_servers() -> None:
    objects = render(VALUES["dashboard"])
    one = next(one for one in containers(objects) if one["name"] == "dashboard")
    mounts = {mount["mountPath"]: mount["name"] for mount in one["volumeMounts"]}
    shown = {path.removeprefix(f"{FOLDERS['server']}/"): name for path, name in mounts.items()}
    assert (shown["tls"], shown["secrets"], shown["tls/ca.crt"]) == ("nothing", "nothing", "folder")
    volumes = {volume["name"]: volume for volume in pod_of(objects, "-server")["spec"]["volumes"]}
    assert "emptyDir" in volumes["nothing"] and volumes["certificate"]["secret"]["secretName"] == "dash-tls"
    # And nobody else sees the key that browsers trust.
    others = [m["name"] for c in containers(objects) if c is not one for m in c["volumeMounts"]]
    assert "certificate" not in others


def selected(policy: dict[str, Any], pod: dict[str, Any]) -> bool:
    labels = policy["spec"]["podSelector"]["matchLabels"]
    return labels.items() <= pod["metadata"]["labels"].items()


def test_the_sites_worker_reaches_the_node_and_nothing_else() -> None:
    objects = render(VALUES["both"])
    worker, node = pod_of(objects, "-worker"), pod_of(objects, "-node")
    policies = [o for o in objects if o["kind"] == "NetworkPolicy" and selected(o, worker)]
    assert [policy["metadata"]["name"] for policy in policies] == ["demo-worker"]
    said = policies[0]["spec"]
    assert set(said["policyTypes"]) == {"Ingress", "Egress"} and said["ingress"] == []
    ((to,),) = ([rule["to"] for rule in said["egress"]],)
    assert said["egress"][0]["ports"] == [{"protocol": "TCP", "port": 9101}]
    (peer,) = to
    assert list(peer) == ["podSelector"]
    labels = peer["podSelector"]["matchLabels"].items()
    assert labels <= node["metadata"]["labels"].items() and not labels <= worker["metadata"]["labels"].items()
    # So it cannot look names up: it is told the address of the node's service, which Kubernetes puts there.
    (told,) = worker["spec"]["containers"][0]["env"]
    service = named(objects, "Service", "-node")
    variable = service["metadata"]["name"].upper().replace("-", "_") + "_SERVICE_HOST"
    assert told == {"name": "FEDSIGMA_NODE", "value": f"$({variable}):9101"}
    assert worker["spec"]["enableServiceLinks"] is True and worker["spec"]["dnsPolicy"] == "None"
    assert service["spec"]["ports"][0]["port"] == 9101
    assert service["spec"]["selector"].items() <= node["metadata"]["labels"].items()


def test_the_node_leaves_by_the_servers_port() -> None:
    (out, names) = named(render(VALUES["site"]), "NetworkPolicy", "-node")["spec"]["egress"]
    assert out["ports"] == [{"protocol": "TCP", "port": 8443}]
    assert {port["port"] for port in names["ports"]} == {53}


def test_node_and_worker_share_neither_secrets_nor_images() -> None:
    objects = render(VALUES["gpu"])
    assert not [o for o in objects if o["kind"] == "Secret"]
    worker, node = pod_of(objects, "-worker")["spec"], pod_of(objects, "-node")["spec"]
    secrets = [v["secret"]["secretName"] for pod in (node, worker) for v in pod["volumes"] if "secret" in v]
    assert secrets == ["fedsigma-node", "fedsigma-worker"]
    assert "images" not in {volume["name"] for volume in node["volumes"]}
    mounts = {m["mountPath"]: m.get("readOnly", False) for m in worker["containers"][0]["volumeMounts"]}
    assert {path for path, read_only in mounts.items() if not read_only} == {
        f"{FOLDERS['site']}/worker",
        "/tmp",
    }
    assert mounts["/data"] and mounts["/weights"] and mounts[f"{FOLDERS['site']}/site.yaml"]
    for pod, part in ((node, "node"), (worker, "worker")):
        other = {"node": "worker", "worker": "node"}[part]
        assert not any(f"/site/{other}" in m["mountPath"] for m in pod["containers"][0]["volumeMounts"])
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_the_sites_files_are_ones_that_a_site_reads() -> None:
    digest = "12" * 31 + "e5"
    rules = {"bundles": [digest], "max_examples": 10_000_000, "gpus": "0,1", "studies": ["demo"]}
    values = {"site": {**SITE, "rules": rules}}
    objects = render(values)
    files = named(objects, "ConfigMap", "-site")["data"]
    connection = build(Connection, yaml.safe_load(files["connection.yaml"]), where="connection.yaml")
    policy = build(SitePolicy, yaml.safe_load(files["site.yaml"]), where="site.yaml")
    assert connection.site == policy.name == "north" and connection.address == "fl.example.org:8443"
    assert (
        policy.bundles == (digest,) and policy.max_examples == 10_000_000 and policy.source == "folder:/data"
    )
    # A new rule starts the worker again, and leaves the node be.
    before = render(VALUES["site"])
    for end, changed in (("-worker", True), ("-node", False)):
        assert (pod_of(before, end) != pod_of(objects, end)) == changed
