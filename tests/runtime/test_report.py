"""The profile as rows and as a table."""

from __future__ import annotations

from sepc.runtime.report import Profile, RegionReport


def report(name: str, kernel: str, predicted_us: float) -> RegionReport:
    bottleneck = "L2" if predicted_us else ""
    return RegionReport(name, "convolution", ("conv2d",), kernel, "", "", predicted_us, bottleneck, 1, 1, (name,))


REPORTS = [report("region_0_convolution", "sepc", 10.0), report("region_1", "torch", 0.0), report("last", "sepc", 2.5)]
PROFILE = Profile.of(REPORTS, {"region_0_convolution": 12.0, "region_1": 7.0, "last": 3.0})


def test_a_profile_is_a_sequence_of_rows_with_sums() -> None:
    assert [row.name for row in PROFILE] == ["region_0_convolution", "region_1", "last"]
    assert PROFILE[0].measured_us == 12
    assert PROFILE[0].bottleneck == "L2"
    assert (PROFILE.measured_us, PROFILE.predicted_us) == (22, 12.5)


def test_the_table_compares_only_what_has_a_prediction() -> None:
    lines = str(PROFILE).splitlines()
    assert len(lines) == 1 + 3 + 1 + 1 + 1
    assert lines[1].split() == ["region_0_convolution", "convolution", "sepc", "12.0", "10.0", "1.20", "L2"]
    assert lines[2].split() == ["region_1", "convolution", "torch", "7.0", "–", "–"]
    assert lines[5].split() == ["3", "regions", "22.0", "12.5", "1.20"]
    assert "15.0 µs" in lines[6]
    assert len({line.index("µs") for line in lines[:1]}) == 1


def test_the_table_of_nothing_prints() -> None:
    assert "0 regions" in str(Profile.of([], {}))
