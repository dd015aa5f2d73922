"""The environment variables of a role's process."""

from __future__ import annotations

import pytest

from distillm_ray.cluster.actors import thread_settings


def test_huge_pages_are_requested_on_the_cpu_in_addition_to_the_users_tunables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert thread_settings(2, "cpu")["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.rtld.optional_static_tls=512")
    expected = "glibc.rtld.optional_static_tls=512:glibc.malloc.hugetlb=1"
    assert thread_settings(2, "cpu")["GLIBC_TUNABLES"] == expected
    assert "GLIBC_TUNABLES" not in thread_settings(2, "cuda")
