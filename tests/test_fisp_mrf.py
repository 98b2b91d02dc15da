"""Fingerprints: against other simulators, at limits, and the fast path against the plain one."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantitron.recon.data import Protocol
from quantitron.recon.signal.extended_phase_graph import TOLERANCE, differentiable_signal, states_needed
from quantitron.recon.signal.fisp_mrf import contrast_signal, pulse_train
from quantitron.recon.signal.phase_graph_in_place import signal_in_place
from quantitron.recon.signal.spoiled_gre import flash_steady_state

SHARED = Path(__file__).parents[2] / "shared" / "data"
TISSUE = {"t1": (0.81, 1.4, 4.16), "t2": (0.065, 0.08, 1.65)}
"""White matter, grey matter, cerebrospinal fluid at 3 T [s]."""


def _random(seed, count, low, high):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(count, dtype=torch.float64, generator=generator)


def _schedule(pulses, phase=None, **changes):
    """Flip angles in lobes of up to 75 degrees, TR of 11 to 14 ms, pulses of phase None, pi or quadratic."""
    ramp = torch.arange(pulses, dtype=torch.float64)
    flip = (
        torch.sin(math.pi * (ramp % 97 + 1) / 98).abs()
        * _random(1, pulses // 97 + 1, 0.3, 1.3)[(ramp / 97).long()]
    )
    phases = {
        None: (),
        "pi": tuple(math.pi * (pulse % 3 == 1) for pulse in range(pulses)),
        "quadratic": tuple(0.013 * pulse**2 for pulse in range(pulses)),
    }
    settings = {
        "flip_angle": tuple(flip.tolist()),
        "echo_time": (0.002,),
        "repetition_time": tuple(_random(2, pulses, 0.011, 0.014).tolist()),
        "inversion_time": (0.02,),
        "rf_phase": phases[phase],
    }
    return Protocol("fisp_mrf", **{**settings, **changes})


def _shared_protocol(name, echo_time=0.0007, inversion_time=0.02):
    file = SHARED / f"openmrf_{name}_fa.txt"
    if not file.exists():
        pytest.skip("the measured schedules are not here")
    flip = [math.radians(float(line)) for line in file.read_text().split()]
    repetition = [float(line) / 1e3 for line in (SHARED / f"openmrf_{name}_tr.txt").read_text().split()]
    return Protocol(
        "fisp_mrf", (echo_time,), tuple(repetition), tuple(flip), inversion_time=(inversion_time,)
    )


def _tissue(**more):
    values = {**TISSUE, **more}
    return {name: torch.tensor(column, dtype=torch.float64) for name, column in values.items()}


def _atoms(count, seed=0, dtype=torch.float64):
    """T1, T2, B1 and efficiency over all that a dictionary holds."""
    t1 = _random(seed, count, math.log(0.015), math.log(6)).exp()
    t2 = torch.minimum(_random(seed + 1, count, math.log(0.004), math.log(3)).exp(), t1)
    b1, inversion = _random(seed + 2, count, 0.7, 1.3), _random(seed + 3, count, 0.5, 1)
    return tuple(values.to(dtype) for values in (t1, t2, b1, inversion))


def _relative(found, expected):
    """Error of each fingerprint over its norm, (v,)."""
    return torch.linalg.vector_norm(found - expected, dim=-1) / torch.linalg.vector_norm(expected, dim=-1)


def _bloch(t1, t2, b1, inversion, protocol):
    """Fingerprint (w,) of one voxel by the Bloch equation of many spins, spread evenly over the gradient."""
    train = pulse_train(protocol)
    spins = 2 * train.pulses + 3  # as many as make the sum over them exact
    dephasing = 2 * math.pi * torch.arange(spins, dtype=torch.float64) / spins
    phases = protocol.rf_phase or (0.0,) * train.pulses
    m = torch.zeros(3, spins, dtype=torch.float64)
    m[2] = 1.0
    if train.inversion_time is not None:
        m[2] = 1 - (1 + inversion) * math.exp(-train.inversion_time / t1)
    samples = []

    def about_z(angle):
        c, s = torch.cos(angle), torch.sin(angle)
        return torch.stack([c * m[0] - s * m[1], s * m[0] + c * m[1], m[2]])

    def relaxed(time):
        e1, e2 = math.exp(-time / t1), math.exp(-time / t2)
        return torch.stack([e2 * m[0], e2 * m[1], e1 * m[2] + 1 - e1])

    for angle, phase, repetition in zip(train.flip_angle, phases, train.repetition_time, strict=True):
        axis = torch.tensor([math.cos(phase), math.sin(phase), 0.0], dtype=torch.float64)[:, None]
        a = b1 * angle  # Rodrigues
        along = (axis * m).sum(0)
        m = m * math.cos(a) + torch.linalg.cross(axis.expand_as(m), m, dim=0) * math.sin(a)
        m = m + axis * along * (1 - math.cos(a))
        m = relaxed(train.echo_time)
        transverse = torch.complex(m[0], m[1]).mean()
        samples.append(transverse * complex(math.cos(phase), -math.sin(phase)) * 1j)
        m = relaxed(repetition - train.echo_time)
        m = about_z(dephasing)
    return torch.stack(samples)


@pytest.mark.parametrize("phase", [None, "pi", "quadratic"])
def test_equals_the_bloch_equation_of_many_spins(phase):
    protocol = _schedule(130, phase)
    parameters = _tissue(inversion=(1.0, 0.9, 0.8))
    b1 = torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64)
    found = contrast_signal(parameters, protocol, b1)
    assert found.shape == (3, 130)
    assert found.is_complex() == (phase == "quadratic")
    columns = [parameters[name].tolist() for name in ("t1", "t2")] + [b1.tolist(), (1.0, 0.9, 0.8)]
    for voxel, values in enumerate(zip(*columns, strict=True)):
        expected = _bloch(*values, protocol)
        if not found.is_complex():
            assert expected.imag.abs().max() < 1e-12
        torch.testing.assert_close(found[voxel] + 0j, expected, rtol=0, atol=2e-6)
        assert expected.abs().max() > 0.05


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # blochsim's own
@pytest.mark.parametrize("name", ["own", "cao", "yun"])
def test_equals_blochsim_in_white_matter_grey_matter_and_fluid(name):
    blochsim = pytest.importorskip("blochsim", reason="blochsim, the independent simulator, is not here")
    protocol = _schedule(300) if name == "own" else _shared_protocol(name)
    parameters = _tissue()
    expected = blochsim.mrf_sim(
        torch.tensor(protocol.flip_angle).rad2deg(),
        1e3 * torch.tensor(protocol.repetition_time),
        1e3 * torch.tensor(TISSUE["t1"]),
        1e3 * torch.tensor(TISSUE["t2"]),
        TI=1e3 * protocol.inversion_time[0],
        states=400,
    )
    expected = torch.as_tensor(expected) * torch.exp(-protocol.echo_time[0] / parameters["t2"])[:, None]
    found = contrast_signal(parameters, protocol).to(expected.dtype)
    # Its receiver has a phase of its own, the same for all.
    turn = torch.vdot(found.flatten(), expected.flatten())
    found = found * (turn / turn.abs())
    assert _relative(found, expected).max() < 0.002


def test_one_pulse_gives_the_sine_of_its_angle():
    protocol = Protocol("fisp_mrf", (0.0,), (1.0,), (math.pi / 2,))
    assert contrast_signal(_tissue(), protocol).flatten().tolist() == pytest.approx([1, 1, 1])
    scaled = contrast_signal(_tissue(), replace(protocol, flip_angle=(0.5,)), torch.tensor([0.8, 1.0, 1.2]))
    assert scaled.flatten().tolist() == pytest.approx([math.sin(0.5 * b1) for b1 in (0.8, 1.0, 1.2)])
    later = contrast_signal(_tissue(), replace(protocol, echo_time=(0.01,)))
    assert later.flatten().tolist() == pytest.approx([math.exp(-0.01 / t2) for t2 in TISSUE["t2"]])


def test_long_repetition_times_give_the_sine_of_each_angle():
    protocol = Protocol("fisp_mrf", (0.0,), (200.0,), (0.3, 1.0, 0.0, 1.5), inversion_time=(200.0,))
    expected = torch.sin(torch.tensor(protocol.flip_angle, dtype=torch.float64)).expand(3, -1)
    torch.testing.assert_close(contrast_signal(_tissue(), protocol), expected)


def test_without_t2_there_is_no_signal_after_an_echo_time_and_no_echo_without_one():
    protocol = _schedule(40)
    parameters = {"t1": torch.tensor([0.8], dtype=torch.float64), "t2": torch.full((1,), 1e-7).double()}
    assert not contrast_signal(parameters, protocol).any()
    found = contrast_signal(parameters, replace(protocol, echo_time=(0.0,)))[0]
    z = 1 - 2 * math.exp(-0.02 / 0.8)
    for pulse in range(40):  # each pulse finds longitudinal magnetisation only
        assert found[pulse].item() == pytest.approx(z * math.sin(protocol.flip_angle[pulse]), abs=1e-9)
        recovery = 1 - math.exp(-protocol.repetition_time[pulse] / 0.8)
        z = z * math.cos(protocol.flip_angle[pulse]) * (1 - recovery) + recovery


def test_inversion_of_every_efficiency():
    protocol = _schedule(30)
    first = math.sin(protocol.flip_angle[0])

    def start(protocol, **more):
        return contrast_signal(_tissue(**more), replace(protocol, echo_time=(0.0,)))[:, 0] / first

    decay = torch.exp(-0.02 / torch.tensor(TISSUE["t1"], dtype=torch.float64))
    torch.testing.assert_close(start(protocol), 1 - 2 * decay)
    torch.testing.assert_close(start(protocol, inversion=(0.9,) * 3), 1 - 1.9 * decay)
    torch.testing.assert_close(start(replace(protocol, inversion_efficiency=0.9)), 1 - 1.9 * decay)
    # The parameter wins; efficiency 0 leaves nothing, and a pulse that does nothing is no pulse at all.
    torch.testing.assert_close(
        start(replace(protocol, inversion_efficiency=0.9), inversion=(0.0,) * 3), 1 - decay
    )
    torch.testing.assert_close(
        contrast_signal(_tissue(inversion=(-1.0,) * 3), protocol),
        contrast_signal(_tissue(), replace(protocol, inversion_time=())),
    )


def test_b1_scales_the_flip_angles():
    protocol, b1 = _schedule(150), torch.tensor([0.8, 1.0, 1.15], dtype=torch.float64)
    found = contrast_signal(_tissue(), protocol, b1)
    for voxel, factor in enumerate(b1.tolist()):
        scaled = replace(protocol, flip_angle=tuple(factor * angle for angle in protocol.flip_angle))
        torch.testing.assert_close(found[voxel], contrast_signal(_tissue(), scaled)[voxel])


def test_phases_that_are_all_alike_change_nothing():
    protocol = _schedule(60)
    turned = replace(protocol, rf_phase=(1.234,) * 60)
    torch.testing.assert_close(contrast_signal(_tissue(), turned), contrast_signal(_tissue(), protocol))


@pytest.mark.parametrize("plain", [False, True])
def test_complex_arithmetic_equals_the_real_where_phases_are_0_and_pi(plain):
    """A phase step of 1e-6 makes everything complex and moves the signal by no more."""
    protocol = _schedule(120, "pi")
    bent = replace(protocol, rf_phase=(*protocol.rf_phase[:-1], protocol.rf_phase[-1] + 1e-6))
    t1, t2, b1, inversion = _atoms(20)
    simulate = differentiable_signal if plain else signal_in_place
    real = simulate(t1, t2, b1, inversion, pulse_train(protocol), 200)
    found = simulate(t1, t2, b1, inversion, pulse_train(bent), 200)
    assert found.is_complex()
    assert not real.is_complex()
    torch.testing.assert_close(found, real + 0j, rtol=0, atol=2e-6)
    # and opposite phases do matter
    assert _relative(simulate(t1, t2, b1, inversion, pulse_train(_schedule(120)), 200), real).min() > 0.005


def test_quadratic_phase_spoils_the_signal_down_to_that_of_an_ideal_gradient_echo():
    """117 degrees (Zur 1991) come close to FLASH; without RF spoiling T2 matters a lot."""
    angle, pulses = math.radians(15), 900
    phase = tuple(math.radians(117) * pulse * (pulse + 1) / 2 % (2 * math.pi) for pulse in range(pulses))
    spoiled = Protocol("fisp_mrf", (0.0,), (0.01,), (angle,) * pulses, rf_phase=phase)
    parameters = {"t1": torch.tensor([0.8, 0.3]).double(), "t2": torch.tensor([0.07, 0.05]).double()}
    flash = flash_steady_state(parameters["t1"], torch.tensor(angle, dtype=torch.float64), 0.01)
    found = contrast_signal(parameters, spoiled)[:, -1]
    assert ((found.abs() - flash) / flash).abs().max() < 0.03
    unspoiled = contrast_signal(parameters, replace(spoiled, rf_phase=()))[:, -1]
    assert unspoiled[0] / flash[0] > 1.2


@pytest.mark.parametrize("phase", [None, "pi", "quadratic"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_fast_path_equals_the_plain_one(phase, dtype, error):
    train = pulse_train(_schedule(160, phase))
    t1, t2, b1, inversion = _atoms(500)  # several batches
    expected = differentiable_signal(t1, t2, b1, inversion, train, 161)
    single = (values.to(dtype) for values in (t1, t2, b1, inversion))
    found = signal_in_place(*single, train, 161)
    assert found.dtype == (dtype if train.is_real else dtype.to_complex())
    assert _relative(found, expected).max() < error


@pytest.mark.parametrize("repetition_time", [(0.5,), (0.004, 0.01, 3.0) * 20])
def test_extreme_times_and_angles_stay_finite_and_right(repetition_time):
    protocol = _schedule(
        60, flip_angle=(0.0, math.pi, math.pi / 2, 1e-5, 0.7) * 12, repetition_time=repetition_time
    )
    t1 = torch.tensor([1e-6, 1e-3, 1e-3, 5.0, 1e3, 0.5])
    t2 = torch.tensor([1e-7, 1e-6, 1e-3, 1e-6, 1e3, 0.05])
    ones = torch.ones(6)
    expected = differentiable_signal(
        t1.double(), t2.double(), None, ones.double(), pulse_train(protocol), 100
    )
    found = signal_in_place(t1, t2, None, ones, pulse_train(protocol))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_atom_does_not_depend_on_its_neighbours():
    protocol = _schedule(300)
    t1, t2, b1, inversion = _atoms(400, dtype=torch.float32)
    together = contrast_signal({"t1": t1, "t2": t2, "inversion": inversion}, protocol, b1)
    for atom in range(0, 400, 57):
        alone = contrast_signal(
            {"t1": t1[atom], "t2": t2[atom], "inversion": inversion[atom]}, protocol, b1[atom]
        )
        assert _relative(alone, together[atom]) < 1e-4


def test_shapes():
    protocol = _schedule(10)
    t1, t2, b1, _ = _atoms(6)
    flat = contrast_signal({"t1": t1, "t2": t2}, protocol, b1)
    grid = contrast_signal({"t1": t1.reshape(2, 3), "t2": t2.reshape(2, 3)}, protocol, b1.reshape(2, 3))
    torch.testing.assert_close(grid, flat.reshape(2, 3, 10))
    assert contrast_signal({"t1": t1[:0], "t2": t2[:0]}, protocol).shape == (0, 10)
    one = contrast_signal({"t1": t1[:, None], "t2": t2[None, :]}, protocol)
    torch.testing.assert_close(one[2, 3], contrast_signal({"t1": t1[2], "t2": t2[3]}, protocol))


def _left_out(protocol, kept=None):
    """Largest error of keeping the orders that the bound asks for, atom by atom, against all."""
    train = pulse_train(protocol)
    t1, t2, b1, inversion = _atoms(25, seed=8)
    t1[:3], t2[:3] = (torch.tensor(TISSUE[name], dtype=torch.float64) for name in ("t1", "t2"))
    expected = signal_in_place(t1, t2, b1, inversion, train, 1100)
    worst = 0.0
    for atom in range(25):
        part = slice(atom, atom + 1)
        states = kept or states_needed(train, float(t2[atom]))
        found = signal_in_place(t1[part], t2[part], b1[part], inversion[part], train, states)
        worst = max(worst, float(_relative(found, expected[part]).max()))
    return worst


@pytest.mark.parametrize("phase", [None, "quadratic"])
def test_orders_that_are_left_out_do_not_matter(phase):
    """The docstring's claim: the error is below a tenth of the decay that is left out."""
    worst = _left_out(_schedule(500, phase))
    assert 0 < worst < TOLERANCE / 10
    assert _left_out(_schedule(500, phase), 30) > TOLERANCE


def test_steady_trains_keep_the_bound_too():
    for angle in (0.2, 0.8, 1.5):
        assert _left_out(_schedule(500, flip_angle=(angle,) * 500)) < TOLERANCE / 10


@pytest.mark.parametrize("name", ["cao", "yun"])
def test_orders_of_the_measured_schedules(name):
    protocol = _shared_protocol(name)
    assert _left_out(protocol) < TOLERANCE / 10
    train = pulse_train(protocol)
    assert states_needed(train, 1.65) >= 150  # cerebrospinal fluid


def test_triangle_is_exact():
    """Order k is fed by the k pulses before and read out by the k after: half the pulses are all orders."""
    train = pulse_train(_schedule(81))
    long = torch.tensor([2.5], dtype=torch.float64)
    assert states_needed(train, 100.0) == 42
    torch.testing.assert_close(
        signal_in_place(long, long, None, torch.ones(1).double(), train, 42),
        signal_in_place(long, long, None, torch.ones(1).double(), train, 1000),
        rtol=1e-13,
        atol=1e-15,
    )


@pytest.mark.parametrize("phase", [None, "pi", "quadratic"])
def test_gradients_equal_finite_differences(phase):
    protocol = _schedule(15, phase)
    inputs = [values.requires_grad_() for values in _atoms(3)]

    def signal(t1, t2, b1, inversion):
        found = contrast_signal({"t1": t1, "t2": t2, "inversion": inversion}, protocol, b1)
        return torch.view_as_real(found) if found.is_complex() else found

    assert torch.autograd.gradcheck(signal, inputs, eps=1e-7, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_forward_derivatives_equal_backward_ones():
    protocol = _schedule(25)
    t1, t2, _, _ = _atoms(4)

    def signal(t1):
        return contrast_signal({"t1": t1, "t2": t2}, protocol)

    value, slope = torch.func.jvp(signal, (t1,), (torch.ones_like(t1),))
    torch.testing.assert_close(value, signal(t1))
    step = 1e-6
    torch.testing.assert_close(
        slope, (signal(t1 + step) - signal(t1 - step)) / (2 * step), rtol=1e-5, atol=1e-8
    )
    jacobian = torch.func.jacrev(lambda t1: signal(t1).sum(0))(t1)
    torch.testing.assert_close(jacobian.T, slope)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"flip_angle": ()}, "no flip angle"),
        ({"repetition_time": (0.01,) * 7}, "20 flip angles but 7 repetition times"),
        ({"rf_phase": (0.0,) * 19}, "20 flip angles but 19 RF phases"),
        ({"echo_time": (0.001, 0.002)}, "one echo time, not 2"),
        ({"echo_time": (0.02,)}, "does not lie within its shortest repetition time"),
        ({"echo_time": (math.nan,)}, "does not lie within"),
        ({"repetition_time": (0.0,)}, "a repetition time of the fingerprint is 0 s"),
        ({"repetition_time": (math.nan,)}, "a repetition time of the fingerprint is nan s"),
        ({"inversion_time": (0.1, 0.2)}, "one inversion time, not 2"),
        ({"inversion_time": (-0.1,)}, "the inversion time of the fingerprint is -0.1 s"),
    ],
)
def test_protocols_that_do_not_fit_together_are_named(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        contrast_signal(_tissue(), replace(_schedule(20), **changes))
