"""What kubectl makes of every overlay of deploy/kubernetes, once."""

from pathlib import Path

import pytest

from tests.kubernetes import OVERLAYS, Manifests, copied, rendered

EXTERNAL = """\
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: sapo
resources: [../../base, ../../secret]
components: [../../components/external-redis, ../../components/images]
configMapGenerator:
  - {name: run, files: [run.yaml]}
"""


@pytest.fixture(scope="session")
def kubernetes_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """deploy/kubernetes with a secret, and with an overlay `external` for a Redis of one's own."""
    copy = copied(tmp_path_factory.mktemp("deploy") / "kubernetes")
    external = copy / "overlays" / "external"
    external.mkdir()
    (external / "kustomization.yaml").write_text(EXTERNAL)
    (external / "run.yaml").write_text((copy / "overlays" / "demo" / "run.yaml").read_text())
    return copy


@pytest.fixture(scope="session")
def texts(kubernetes_tree: Path) -> dict[str, str]:
    return {name: rendered(kubernetes_tree / "overlays" / name) for name in (*OVERLAYS, "external")}


@pytest.fixture(params=(*OVERLAYS, "external"))
def text(request: pytest.FixtureRequest, texts: dict[str, str]) -> str:
    return texts[request.param]


@pytest.fixture
def manifests(text: str) -> Manifests:
    return Manifests(text)
