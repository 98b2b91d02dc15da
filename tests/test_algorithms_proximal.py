"""FISTA, ADMM and primal-dual splitting reach the same, right minimisers; power iteration the eigenvalue."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from quantitron.recon.algorithms.admm import admm
from quantitron.recon.algorithms.fista import fista
from quantitron.recon.algorithms.power_iteration import largest_eigenvalue
from quantitron.recon.algorithms.primal_dual import primal_dual, primal_dual_steps
from quantitron.recon.priors.low_rank import BlockLowRank
from quantitron.recon.priors.total_variation import JointTotalVariation


def _random(seed, *shape, dtype=torch.complex128):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _shrink(v, threshold):
    size = v.abs()
    return torch.where(size > threshold, v * (1 - threshold / size), torch.zeros_like(v))


class LeastSquares:
    """f(x) = 1/2 ||A x - b||^2 for x of any shape."""

    def __init__(self, shape, rows, seed, dtype=torch.complex128, decay=0.0):
        n = int(np.prod(shape))
        self.shape = shape
        self.matrix = _random(seed, rows, n, dtype=dtype) / rows**0.5
        self.matrix = self.matrix * torch.logspace(0, -decay, n, dtype=self.matrix.real.dtype)
        self.data = _random(seed + 1, rows, dtype=dtype)
        self.hessian = self.matrix.mH @ self.matrix
        self.right = self.matrix.mH @ self.data
        self.lipschitz = float(torch.linalg.eigvalsh(self.hessian)[-1])
        self.zeros = torch.zeros(shape, dtype=dtype)

    def gradient(self, x):
        return (self.hessian @ x.flatten() - self.right).reshape(self.shape)

    def value(self, x):
        return 0.5 * float((self.matrix @ x.flatten() - self.data).abs().square().sum())

    def solve(self, right, normal):
        """Minimiser of f(x) + 1/2 <x, normal x> - Re <x, right>."""
        return torch.linalg.solve(self.hessian + normal, self.right + right.flatten()).reshape(self.shape)


LASSO_WEIGHT = 0.5


def _lasso_by(algorithm, problem, tolerance=1e-9, iterations=20000):
    """Minimise f(x) + weight |x|_1."""
    weight = LASSO_WEIGHT
    if algorithm == "fista":
        return fista(
            problem.gradient,
            lambda v, step: _shrink(v, weight * step),
            problem.zeros,
            1 / problem.lipschitz,
            iterations,
            tolerance,
        )
    if algorithm == "admm":
        unit = torch.eye(problem.hessian.shape[0], dtype=problem.hessian.dtype)
        return admm(
            lambda v, penalty, _: problem.solve(penalty * v, penalty * unit),
            lambda v, step: _shrink(v, weight * step),
            problem.zeros,
            iterations=iterations,
            tolerance=tolerance,
        ).z
    return primal_dual(
        lambda x: x,
        lambda p: p,
        1.0,
        lambda p, _: p / (p.abs() / weight).clamp_min(1),
        problem.zeros,
        primal_dual_steps(problem.lipschitz, 1.0),
        problem.gradient,
        problem.lipschitz,
        iterations=iterations,
        tolerance=tolerance,
    )[0]


@pytest.mark.parametrize("algorithm", ["fista", "admm", "primal dual"])
def test_lasso_against_scipy(algorithm):
    """The real lasso as a smooth problem with bounds, x = positive - negative part."""
    problem = LeastSquares((20,), 15, 0, torch.float64)
    matrix, data = problem.matrix.numpy(), problem.data.numpy()

    def split(parts):
        x = parts[:20] - parts[20:]
        residual = matrix @ x - data
        slope = matrix.T @ residual
        value = 0.5 * residual @ residual + LASSO_WEIGHT * parts.sum()
        return value, np.concatenate([slope, -slope]) + LASSO_WEIGHT

    peer = minimize(
        split,
        np.zeros(40),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * 40,
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10000},
    )
    x = _lasso_by(algorithm, problem)
    objective = problem.value(x) + LASSO_WEIGHT * float(x.abs().sum())
    assert objective == pytest.approx(peer.fun, rel=1e-8)
    torch.testing.assert_close(x, torch.from_numpy(peer.x[:20] - peer.x[20:]), rtol=0, atol=1e-5)
    assert 0 < int((x.abs() > 1e-6).sum()) < 20


@pytest.mark.parametrize("algorithm", ["fista", "admm", "primal dual"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.complex128, 1e-6), (torch.complex64, 1e-4)])
def test_complex_lasso_meets_its_optimality_conditions(algorithm, dtype, atol):
    """-gradient = weight x / |x| where x is not zero, at most the weight where it is."""
    problem = LeastSquares((20,), 15, 2, dtype)
    x = _lasso_by(algorithm, problem, 1e-9 if dtype == torch.complex128 else 1e-7, 5000)
    assert x.dtype == dtype
    slope = -problem.gradient(x)
    support = x.abs() > 1e-3
    assert 0 < int(support.sum()) < 20
    torch.testing.assert_close(
        slope[support], LASSO_WEIGHT * x[support] / x[support].abs(), rtol=0, atol=atol
    )
    assert float(slope.abs().max()) <= LASSO_WEIGHT + atol


VOXEL = (1e-3, 2e-3, 1e-3)
SHAPE = (5, 2, 2, 4)  # (x, k, z, y)
PRIOR = JointTotalVariation(0.15, VOXEL)


def _total_variation_by(algorithm, problem):
    """Minimise f(U) + R(U), and a subgradient p of the penalty at K U."""
    norm = PRIOR.norm(SHAPE)
    if algorithm == "fista":
        dual = None

        def proximal(v, step):
            nonlocal dual
            image, dual = PRIOR.proximal(v, step, dual, iterations=50)
            return image

        image = fista(problem.gradient, proximal, problem.zeros, 1 / problem.lipschitz, 3000, 1e-10)
        return image, dual
    if algorithm == "admm":
        units = torch.eye(problem.zeros.numel(), dtype=problem.zeros.dtype).reshape(-1, *SHAPE)
        normal = torch.stack([PRIOR.adjoint(PRIOR.operator(unit)).flatten() for unit in units], dim=1)
        state = admm(
            lambda v, penalty, _: problem.solve(penalty * PRIOR.adjoint(v), penalty * normal),
            PRIOR.shrink,
            problem.zeros,
            PRIOR.operator,
            relaxation=1.6,
            iterations=5000,
            tolerance=1e-10,
        )
        return state.x, state.penalty * state.u
    return primal_dual(
        PRIOR.operator,
        PRIOR.adjoint,
        norm,
        lambda p, _: PRIOR.project(p),
        problem.zeros,
        primal_dual_steps(problem.lipschitz, norm),
        problem.gradient,
        problem.lipschitz,
        iterations=20000,
        tolerance=1e-9,
    )


def test_all_reach_the_minimiser_of_least_squares_with_total_variation():
    """Optimal: gradient + K^H p = 0 with p feasible and aligned with K U. And the value that scipy finds."""
    problem = LeastSquares(SHAPE, 60, 4)
    images = {}
    for algorithm in ("fista", "admm", "primal dual"):
        image, p = _total_variation_by(algorithm, problem)
        slope = problem.gradient(image) + PRIOR.adjoint(p)
        assert float(slope.abs().max()) < 1e-5, algorithm
        torch.testing.assert_close(PRIOR.project(p), p, rtol=0, atol=1e-8)
        aligned = float(torch.vdot(p.flatten(), PRIOR.operator(image).flatten()).real)
        assert aligned == pytest.approx(PRIOR.value(image), abs=1e-5), algorithm
        images[algorithm] = image
    torch.testing.assert_close(images["admm"], images["fista"], rtol=0, atol=1e-5)
    torch.testing.assert_close(images["primal dual"], images["fista"], rtol=0, atol=1e-5)

    small = 1e-6

    def smoothed(parts):
        u = torch.view_as_complex(torch.from_numpy(parts).reshape(*SHAPE, 2))
        squares = PRIOR.operator(u).abs().square().sum((0, 2))
        value = problem.value(u) + 0.15 * float((squares + small**2).sqrt().sum())
        slope = problem.gradient(u) + PRIOR.precision(u, PRIOR.reweighting(u, small))
        return value, torch.view_as_real(slope).flatten().numpy()

    peer = minimize(
        smoothed,
        np.zeros(2 * problem.zeros.numel()),
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 1e-14, "gtol": 1e-9, "maxiter": 20000, "maxfun": 40000},
    )
    value = problem.value(images["fista"]) + PRIOR.value(images["fista"])
    assert value == pytest.approx(peer.fun, rel=1e-5)
    assert value <= peer.fun + 1e-9


def _steps_to(problem, restart, accuracy):
    """Iterations until x is within an accuracy of the solution; f strongly convex, g = 0."""
    exact = torch.linalg.solve(problem.hessian, problem.right)
    taken = []

    def near(x, iteration):
        taken.append(iteration)
        return float(torch.linalg.vector_norm(x - exact)) < accuracy * float(torch.linalg.vector_norm(exact))

    fista(
        problem.gradient,
        lambda v, _: v,
        problem.zeros,
        1 / problem.lipschitz,
        20000,
        0.0,
        restart,
        near,
    )
    return len(taken)


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_restart_pays_on_ill_conditioned_problems(seed):
    problem = LeastSquares((20,), 60, seed, decay=1.5)
    without, with_restart = _steps_to(problem, False, 1e-6), _steps_to(problem, True, 1e-6)
    assert with_restart < without < 20000


def test_diagonal_metric_undoes_bad_scaling():
    """Steps of their own for every component: the same minimiser in a fraction of the iterations."""
    problem = LeastSquares((20,), 60, 30, decay=2.0)
    scale = 1 / problem.hessian.diagonal().real
    balanced = scale.sqrt()[:, None] * problem.hessian * scale.sqrt()
    steps = scale / float(torch.linalg.eigvalsh(balanced)[-1])

    def run(step):
        count = []

        def stop(x, n):
            count.append(n)
            return False

        x = fista(
            problem.gradient, lambda v, s: _shrink(v, 0.01 * s), problem.zeros, step, 20000, 1e-10, True, stop
        )
        return x, len(count)

    (plain, slow), (preconditioned, fast) = run(1 / problem.lipschitz), run(steps)
    torch.testing.assert_close(preconditioned, plain, rtol=0, atol=1e-5)
    assert fast < slow / 5


def test_stop_ends_at_the_discrepancy():
    """The first iterate whose residual is at most the noise, and none after it."""
    problem = LeastSquares((20,), 60, 40)
    seen = []
    level = 1.05 * problem.value(torch.linalg.solve(problem.hessian, problem.right))

    def noise_reached(x, iteration):
        seen.append((iteration, problem.value(x)))
        return problem.value(x) <= level

    x = fista(
        problem.gradient, lambda v, _: v, problem.zeros, 0.2 / problem.lipschitz, 500, 0.0, stop=noise_reached
    )
    assert [iteration for iteration, _ in seen] == list(range(len(seen)))
    assert all(value > level for _, value in seen[:-1])
    assert problem.value(x) == seen[-1][1] <= level


def test_shifting_blocks_settle_with_a_denoised_image():
    """FISTA with shifted blocks and a generator: twice the same bits, other shifts others; noise falls."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.einsum("kr,rxzy->xkzy", _random(1, 5, 1), _random(2, 1, 12, 6, 12))
    noisy = truth + 0.5 * _random(3, *truth.shape)
    prior = BlockLowRank(0.5 * (64**0.5 + 5**0.5), (4, 4, 4))

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return fista(
            lambda u: u - noisy,
            lambda v, step: prior.proximal(v, step, prior.random_shift(v.shape, generator)),
            torch.zeros_like(noisy),
            0.5,
            20,
        )

    assert prior.random_shift(truth.shape, generator) != (0, 0, 0)
    image = run(0)
    assert torch.equal(image, run(0))
    assert not torch.equal(image, run(1))
    error, before = torch.linalg.vector_norm(image - truth), torch.linalg.vector_norm(noisy - truth)
    assert float(error) < 0.7 * float(before)


def _denoise(penalty=1.0, balance=0, iterations=300, tolerance=1e-8, start=None, relaxation=1.0, v=None):
    """Minimise 1/2 |x - v|^2 + |x|_1, split as z = 3 x: the closed form is known."""
    v = _random(50, 30) * 2 if v is None else v
    return admm(
        lambda target, rho, _: (v + 3 * rho * target) / (1 + 9 * rho),
        lambda target, step: _shrink(target, step / 3),
        torch.zeros_like(v) if start is None else start,
        lambda x: 3 * x,
        penalty,
        relaxation,
        balance,
        iterations,
        tolerance,
    )


@pytest.mark.parametrize("relaxation", [0.8, 1.0, 1.8])
def test_admm_finds_the_closed_form_and_multiplier(relaxation):
    v = _random(50, 30) * 2
    state = _denoise(relaxation=relaxation, penalty=0.2)
    torch.testing.assert_close(state.x, _shrink(v, 1.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(3 * state.penalty * state.u, v - state.x, rtol=0, atol=1e-6)
    assert max(state.primal_residual, state.dual_residual) <= 1e-8
    assert state.iterations < 300


@pytest.mark.parametrize("penalty", [1e-4, 1e4])
def test_balanced_residuals_mend_a_bad_penalty(penalty):
    v = _random(50, 30) * 2
    fixed, balanced = _denoise(penalty, 0, 60), _denoise(penalty, 40, 60)
    exact = _shrink(v, 1.0)
    error = [float(torch.linalg.vector_norm(state.x - exact)) for state in (fixed, balanced)]
    assert error[1] < 1e-3 * error[0]
    assert balanced.penalty != penalty
    torch.testing.assert_close(3 * balanced.penalty * balanced.u, v - exact, rtol=0, atol=1e-3)


def test_admm_goes_on_where_it_stopped():
    whole, half = _denoise(0.1, iterations=20, tolerance=0.0), _denoise(0.1, iterations=10, tolerance=0.0)
    rest = _denoise(start=half, iterations=10, tolerance=0.0)
    assert torch.equal(rest.x, whole.x)
    assert torch.equal(rest.u, whole.u)


def test_admm_ends_at_zero():
    """Nothing to find: residuals of zero over zero count as met."""
    state = _denoise(v=torch.zeros(4, dtype=torch.complex64))
    assert state.iterations == 1
    assert not state.x.any()


def test_chambolle_pock_without_smooth_part():
    """Total variation denoising with f = 0 and g the distance: the minimiser of the proximal operator."""
    v = _random(60, *SHAPE)
    exact, dual = PRIOR.proximal(v, 1.0, iterations=2000)
    x, p = primal_dual(
        PRIOR.operator,
        PRIOR.adjoint,
        PRIOR.norm(SHAPE),
        lambda p, _: PRIOR.project(p),
        torch.zeros_like(v),
        primal_dual_steps(0.0, PRIOR.norm(SHAPE)),
        proximal=lambda u, step: (u + step * v) / (1 + step),
        iterations=5000,
        tolerance=1e-9,
    )
    torch.testing.assert_close(x, exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(PRIOR.adjoint(p), PRIOR.adjoint(dual), rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", [False, True])
def test_primal_dual_stays_at_the_solution(start):
    """Started at minimiser and dual it ends at once; started elsewhere it does not."""
    problem = LeastSquares(SHAPE, 60, 4)
    image, p = _total_variation_by("primal dual", problem)
    calls = []
    norm = PRIOR.norm(SHAPE)
    primal_dual(
        PRIOR.operator,
        PRIOR.adjoint,
        norm,
        lambda q, _: PRIOR.project(q),
        image if start else problem.zeros,
        primal_dual_steps(problem.lipschitz, norm),
        problem.gradient,
        problem.lipschitz,
        dual_start=p if start else None,
        iterations=100,
        tolerance=1e-7,
        stop=lambda x, iteration: bool(calls.append(iteration)),
    )
    assert len(calls) == (1 if start else 100)


def test_steps_are_the_longest_and_longer_ones_are_refused():
    for lipschitz, norm, dual_step in ((2.0, 3.0, None), (0.0, 3.0, None), (2.0, 3.0, 0.5)):
        primal, dual = primal_dual_steps(lipschitz, norm, dual_step)
        assert 1 / primal == pytest.approx(lipschitz / 2 + dual * norm**2)
        assert dual == dual_step or dual_step is None
    arguments = (lambda x: x, lambda p: p, 1.0, lambda p, _: p, torch.ones(3))
    primal, dual = primal_dual_steps(2.0, 1.0)
    with pytest.raises(ValueError, match="primal step"):
        primal_dual(*arguments, (1.01 * primal, dual), lambda x: 2 * x, 2.0)
    with pytest.raises(ValueError, match="primal step"):
        primal_dual(*arguments, (-primal, dual), lambda x: 2 * x, 2.0)
    for wrong in ((2.0, 0.0, None), (-1.0, 1.0, None), (1.0, 1.0, 0.0)):
        with pytest.raises(ValueError, match="above zero"):
            primal_dual_steps(*wrong)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="steps must be above zero"):
        fista(lambda x: x, lambda v, _: v, torch.ones(2), torch.tensor([1.0, 0.0]))
    for settings in ({"penalty": 0.0}, {"relaxation": 2.0}):
        with pytest.raises(ValueError, match="must"):
            _denoise(**settings)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.complex128, 1e-5), (torch.complex64, 1e-3), (torch.float64, 1e-5)]
)
def test_power_iteration_against_eigvalsh(dtype, tolerance):
    """Temple's inequality: largest - value <= residual^2 / (value - second largest)."""
    matrix = _random(70, 30, 20, dtype=dtype)
    hessian = matrix.mH @ matrix
    second, exact = torch.linalg.eigvalsh(hessian)[-2:].tolist()
    calls = []

    def apply(x):
        calls.append(1)
        return (hessian @ x.flatten()).reshape(4, 5)

    def run(seed, tolerance):
        generator = torch.Generator().manual_seed(seed)
        return largest_eigenvalue(apply, torch.zeros((4, 5), dtype=dtype), generator, 5000, tolerance)

    value = run(0, tolerance)
    assert exact - (tolerance * value) ** 2 / (value - second) - 1e-5 <= value <= exact * (1 + 1e-6)
    few = len(calls)
    assert value == run(0, tolerance)  # the generator alone decides
    assert run(1, 0.3) != run(2, 0.3)
    calls.clear()
    rough = run(0, 0.3)
    assert len(calls) < few / 2
    # Some eigenvalue lies within the tolerance of the value.
    assert float((torch.linalg.eigvalsh(hessian) - rough).abs().min()) <= 0.3 * rough


def test_power_iteration_agrees_with_the_norm_of_the_difference():
    prior = JointTotalVariation(1.0, VOXEL, component_weights=torch.tensor([1.0, 0.5], dtype=torch.float64))
    shape = (9, 2, 3, 8)
    value = largest_eigenvalue(
        lambda u: prior.adjoint(prior.operator(u)),
        torch.zeros(shape, dtype=torch.complex128),
        torch.Generator().manual_seed(0),
        2000,
        1e-4,
    )
    assert value == pytest.approx(prior.norm(shape) ** 2, rel=1e-5)


def test_power_iteration_of_large_images_in_single_precision():
    like = torch.zeros(2_000_000, dtype=torch.complex64)
    value = largest_eigenvalue(lambda x: 3 * x, like, torch.Generator().manual_seed(0), 5, 1e-5)
    assert value == pytest.approx(3.0, rel=2e-6)


def test_power_iteration_of_odd_operators():
    like, generator = torch.zeros(5, dtype=torch.complex64), torch.Generator().manual_seed(0)
    assert largest_eigenvalue(torch.zeros_like, like, generator) == 0
    with pytest.raises(ValueError, match="not positive semidefinite"):
        largest_eigenvalue(lambda x: -x, like, generator)
    with pytest.raises(ValueError, match="not positive semidefinite"):
        largest_eigenvalue(lambda x: x * float("nan"), like, generator)
