"""The chosen masks on calls that had no say in the choice."""

from __future__ import annotations

from fpscompile import lowerings
from fpscompile.calibration.observe import Call
from fpscompile.calibration.report import CalibrationReport
from fpscompile.plan import PhasePlan, Plan, resolve
from fpscompile.selection import masks_of_call


class HeldOut:
    """Runs the chosen masks on calls that had no say in the choice."""

    def __init__(self, report: CalibrationReport, one_phase: bool) -> None:
        self.report = report
        self.one_phase = one_phase
        self.errors: dict[str, list[list[float]]] = {site.name: [[] for _ in report.ranges] for site in report.sites}
        """Of each call, by site and phase."""
        self.plans: dict[str, Plan] = {}
        for site in report.sites:
            phases = tuple(
                PhasePlan(site.window(index), None, site.granularities[index]) for index in range(len(report.ranges))
            )
            self.plans[site.name] = Plan(
                report.tile, phases, quant=report.quant, remainder=report.remainder, lowering="gather"
            )

    def __call__(self, call: Call) -> None:
        if call.site not in self.plans:
            return
        layout = call.resolved
        resolved = resolve(
            self.plans[call.site], layout.q_layout.grid, layout.q_layout.length, layout.k_layout.length,
            layout.q_layout.before, layout.k_layout.before, call.q.shape[1],
        )  # fmt: skip
        phases = tuple(0 if self.one_phase else phase for phase in call.phases)
        mask, at = None, phases
        if resolved.dynamic:
            resolved, mask = masks_of_call(None, call.q, call.k, call.key_mask, phases, resolved, call.scale)
            at = tuple(range(len(phases)))
        out, _ = lowerings.forward(
            lowerings.get("gather"), call.q, call.k, call.v, key_mask=call.key_mask, phases=at, resolved=resolved,
            scale=call.scale, block_mask=mask,
        )  # fmt: skip
        difference = (out.float() - call.out.float()).flatten(1).norm(dim=1)
        for phase, error in zip(phases, difference / call.out.float().flatten(1).norm(dim=1), strict=True):
            self.errors[call.site][phase].append(float(error))

    def finish(self) -> None:
        """Write each site's error into the report: phases count by their share of the fitting calls, as they do in the
        prediction, whatever mixture of steps was held out."""
        for site in self.report.sites:
            errors, seen = self.errors[site.name], [phase for phase, share in enumerate(site.shares) if share > 0]
            known = [phase for phase in seen if errors[phase]]
            site.held_out_calls = sum(len(errors[phase]) for phase in known)
            if not known:
                continue
            if known != seen:
                missing = ", ".join(self.report.range_text(phase) for phase in seen if phase not in known)
                self.report.notes.append(
                    f"{site.name}: no held-out sample reached progress {missing}: the measured error is of other steps"
                )
            total = sum(site.shares[phase] for phase in known)
            site.measured = sum(site.shares[phase] / total * sum(errors[phase]) / len(errors[phase]) for phase in known)
            limit = self.report.max_error
            if limit is not None and site.measured > limit and not site.reason:
                self.report.notes.append(
                    f"{site.name}: held-out samples err by {site.measured:.4f}, more than max_error={limit:g} "
                    f"(predicted {site.predicted:.4f}): calibrate with more samples, or a smaller max_error"
                )
