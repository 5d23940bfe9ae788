"""Writes flightquant.json, the Grafana dashboard: ``python deploy/grafana/generate.py``; ``--check`` only compares.

Needs ``grafana-foundation-sdk`` (the ``deploy`` extra).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import VizLegendOptions, VizTooltipOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

TARGET = Path(__file__).with_name("flightquant.json")
SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
SELECT = 'job=~"$job", instance=~"$instance"'
"""What every expression selects by; ``@`` stands for it below."""


@dataclass(frozen=True)
class Panel:
    """One panel: its title, unit, a sentence about how to read it, and expressions by legend."""

    title: str
    unit: str
    text: str
    series: dict[str, str]
    single: bool = False
    exemplars: bool = False


def _quantiles(metric: str, by: str) -> dict[str, str]:
    return {
        f"p{share * 100:g} {{{{{by}}}}}": (
            f"histogram_quantile({share}, sum by ({by}, le) (rate({metric}_bucket{{@}}[$__rate_interval])))"
        )
        for share in (0.5, 0.95, 0.99)
    }


ROWS: dict[str, list[Panel]] = {
    "At a glance": [
        Panel(
            "Throughput",
            "Bps",
            "Bytes of weights a second, all replicas.",
            {"in": 'sum(rate(flightquant_payload_bytes_total{direction="in", @}[$__rate_interval]))'},
            single=True,
        ),
        Panel(
            "Failed exchanges",
            "percentunit",
            "Share of exchanges that ended with an error of any kind; cancelled ones do not count.",
            {
                "failed": 'sum(rate(flightquant_exchanges_total{outcome!~"ok|cancelled", @}[$__rate_interval]))'
                " / sum(rate(flightquant_exchanges_total{@}[$__rate_interval]))"
            },
            single=True,
        ),
        Panel(
            "Calls in flight", "short", "Now, of all replicas.", {"calls": "sum(flightquant_calls_in_flight{@})"}, True
        ),
        Panel(
            "Fullest replica",
            "percentunit",
            "Calls in flight over the limit, of the replica that is fullest.",
            {"calls": "max(flightquant_calls_in_flight{@} / flightquant_calls_limit{@})"},
            single=True,
        ),
        Panel(
            "Memory",
            "percentunit",
            "Resident memory over the limit, of the replica that is nearest to it.",
            {"memory": "max(process_resident_memory_bytes{@} / flightquant_memory_limit_bytes{@})"},
            single=True,
        ),
        Panel("Replicas", "short", "Scraped with success.", {"up": "sum(up{@})"}, single=True),
    ],
    "Traffic": [
        Panel(
            "Exchanges by outcome",
            "ops",
            "What is not ok says why.",
            {"{{outcome}}": "sum by (outcome) (rate(flightquant_exchanges_total{@}[$__rate_interval]))"},
        ),
        Panel(
            "Exchanges by scheme",
            "ops",
            "",
            {"{{scheme}}": "sum by (scheme) (rate(flightquant_exchanges_total{@}[$__rate_interval])) > 0"},
        ),
        Panel(
            "Bytes of weights in, of answers out",
            "Bps",
            "Weights as sent; packed weights, scales and zero points.",
            {"{{direction}}": "sum by (direction) (rate(flightquant_payload_bytes_total{@}[$__rate_interval]))"},
        ),
        Panel(
            "Bytes copied",
            "Bps",
            "transport: Arrow joins gRPC's slices once. service: ours, always 0 for aligned columns.",
            {"{{site}}": "sum by (site) (rate(flightquant_copied_bytes_total{@}[$__rate_interval]))"},
        ),
        Panel(
            "Layers by status",
            "ops",
            "What is not ok was refused as a row, and its stream went on.",
            {"{{status}}": "sum by (status) (rate(flightquant_rows_total{@}[$__rate_interval]))"},
        ),
        Panel(
            "Actions",
            "ops",
            "",
            {
                "{{action}} {{outcome}}": "sum by (action, outcome) "
                "(rate(flightquant_actions_total{@}[$__rate_interval])) > 0"
            },
        ),
    ],
    "Latency": [
        Panel(
            "Whole exchange",
            "s",
            "From the headers to the end: a long stream is a long exchange. Dots are traces.",
            _quantiles("flightquant_exchange_seconds", "op"),
            exemplars=True,
        ),
        Panel(
            "Where the time goes",
            "s",
            "Seconds per second in each stage. receive includes the wait for the client.",
            {"{{stage}}": "sum by (stage) (rate(flightquant_stage_seconds_sum{@}[$__rate_interval]))"},
        ),
        Panel(
            "One batch, by stage",
            "s",
            "A rising queue means that cores are short; a rising write that clients read slowly.",
            {
                "p99 {{stage}}": "histogram_quantile(0.99, sum by (stage, le) "
                "(rate(flightquant_stage_seconds_bucket{@}[$__rate_interval])))"
            },
            exemplars=True,
        ),
    ],
    "Cost of layers": [
        Panel(
            "Kernel time by layer class",
            "s",
            "Kernel seconds per second; the ten that cost most.",
            {
                "{{layer_class}} {{scheme}}": "topk(10, sum by (layer_class, scheme) "
                "(rate(flightquant_layer_kernel_seconds_total{@}[$__rate_interval])))"
            },
        ),
        Panel(
            "Bytes by layer class",
            "Bps",
            "The ten with most weights.",
            {
                "{{layer_class}} {{scheme}}": "topk(10, sum by (layer_class, scheme) "
                "(rate(flightquant_layer_input_bytes_total{@}[$__rate_interval])))"
            },
        ),
        Panel(
            "Time for each weight",
            "s",
            "By scheme. More than ten nanoseconds means a slow instruction set or starved cores.",
            {
                "{{scheme}}": "sum by (scheme) (rate(flightquant_layer_kernel_seconds_total{@}[$__rate_interval]))"
                " / sum by (scheme) (rate(flightquant_layer_weights_total{@}[$__rate_interval]))"
            },
        ),
        Panel(
            "Layers",
            "ops",
            "",
            {"{{scheme}}": "sum by (scheme) (rate(flightquant_layers_total{@}[$__rate_interval]))"},
        ),
    ],
    "Saturation": [
        Panel(
            "Calls",
            "short",
            "waiting: until fewer bytes are held. At the limit new calls are refused.",
            {
                "in flight {{instance}}": "flightquant_calls_in_flight{@}",
                "waiting {{instance}}": "flightquant_calls_waiting{@}",
                "peak {{instance}}": "flightquant_calls_in_flight_peak{@}",
                "limit {{instance}}": "flightquant_calls_limit{@}",
            },
        ),
        Panel(
            "Refused before their body was read",
            "ops",
            "",
            {"{{code}}": "sum by (code) (rate(flightquant_refusals_total{@}[$__rate_interval]))"},
        ),
        Panel(
            "Batches in the engine",
            "short",
            "Computing or waiting for threads.",
            {"{{instance}}": "flightquant_engine_batches{@}"},
        ),
        Panel(
            "Bytes of batches",
            "bytes",
            "Over the limit running calls wait and new ones are refused.",
            {
                "held {{instance}}": "flightquant_batch_bytes_in_flight{@}",
                "limit {{instance}}": "flightquant_batch_bytes_limit{@}",
            },
        ),
        Panel(
            "Memory of the process",
            "bytes",
            "gRPC's memory is in none of the pools, only in resident.",
            {
                "resident {{instance}}": "process_resident_memory_bytes{@}",
                "arrow {{instance}}": "flightquant_arrow_pool_bytes{@}",
                "kept for answers {{instance}}": "flightquant_output_store_bytes{@}",
                "limit {{instance}}": "flightquant_memory_limit_bytes{@}",
            },
        ),
        Panel(
            "CPU and threads",
            "short",
            "Cores in use, threads that compute, threads in all (one of gRPC's for each call).",
            {
                "cores {{instance}}": "rate(process_cpu_seconds_total{@}[$__rate_interval])",
                "compute {{instance}}": "flightquant_compute_threads{@}",
                "all {{instance}}": "flightquant_process_threads{@}",
            },
        ),
        Panel(
            "CPU seconds for each GiB of weights",
            "s",
            "Receiving, quantizing and answering: what a replica's cores buy.",
            {
                "{{instance}}": "rate(process_cpu_seconds_total{@}[$__rate_interval]) / on (instance, job) "
                '(rate(flightquant_payload_bytes_total{direction="in", @}[$__rate_interval]) / 2^30)'
            },
        ),
        Panel(
            "Versions",
            "short",
            "Replicas by version and instruction set: two during a rollout, one otherwise.",
            {"{{flightquant}} {{isa}}": "count by (flightquant, isa) (flightquant_build_info{@})"},
        ),
    ],
}


def expressions() -> list[str]:
    """Every expression of the dashboard, with its variables as Grafana would fill them in with "All"."""
    filled = [query for panels in ROWS.values() for panel in panels for query in panel.series.values()]
    return [query.replace("@", 'job=~".*", instance=~".*"').replace("$__rate_interval", "1m") for query in filled]


def _panel(panel: Panel) -> timeseries.Panel | stat.Panel:
    built = stat.Panel() if panel.single else timeseries.Panel()
    built = built.title(panel.title).description(panel.text).unit(panel.unit).datasource(SOURCE).min(0)
    built = built.height(4 if panel.single else 8).span(4 if panel.single else 12)
    if isinstance(built, timeseries.Panel):
        legend = VizLegendOptions().display_mode(common.LegendDisplayMode.LIST).show_legend(True)
        tooltip = VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
        built = built.fill_opacity(8).legend(legend.placement(common.LegendPlacement.BOTTOM)).tooltip(tooltip)
    for place, (name, query) in enumerate(panel.series.items()):
        target = prometheus.Dataquery().expr(query.replace("@", SELECT)).legend_format(name)
        target = target.ref_id(chr(ord("A") + place))
        built = built.with_target(target.exemplar(True) if panel.exemplars else target)
    return built


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(label).query(query).datasource(SOURCE)
    variable = variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).multi(True).include_all(True)
    return variable.all_value(".*")


def build() -> str:
    """The dashboard as JSON."""
    board = dashboard.Dashboard("flightquant").uid("flightquant").tags(["flightquant"]).refresh("10s")
    board = board.time("now-30m", "now").timezone("browser").readonly()
    board = board.with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
    board = board.with_variable(_variable("job", "Job", "label_values(flightquant_build_info, job)"))
    board = board.with_variable(
        _variable("instance", "Replica", 'label_values(flightquant_build_info{job=~"$job"}, instance)')
    )
    for title, panels in ROWS.items():
        board = board.with_row(dashboard.Row(title))
        for panel in panels:
            board = board.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


if __name__ == "__main__":
    made = build()
    if "--check" not in sys.argv:
        TARGET.write_text(made)
    elif TARGET.read_text() != made:
        sys.exit(f"{TARGET} is not what {Path(__file__).name} makes: run it")
