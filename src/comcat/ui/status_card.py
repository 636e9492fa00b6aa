"""What a job is doing, as a piece of HTML; every text in it is escaped."""

from __future__ import annotations

import time
from html import escape

from ..report.format import duration
from .work import DONE, FAILED, RUNNING, STOPPED, STOPPING, WAITING, Job, Line

_WORDS = {
    WAITING: "waiting",
    RUNNING: "running",
    STOPPING: "stopping",
    DONE: "done",
    STOPPED: "stopped",
    FAILED: "not done",
}
_MARKS = {DONE: "✓", FAILED: "✕", STOPPED: "■", WAITING: "…"}

CSS = """
.card { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px 16px;
  background: var(--background-fill-secondary); line-height: 1.45; overflow-wrap: anywhere; }
.card .head { display: flex; gap: 10px; align-items: baseline; font-weight: 600; }
.card .state { font-size: 0.85em; padding: 1px 10px; border-radius: 99px; border: 1px solid currentColor; }
.card.running .state, .card.stopping .state { color: var(--primary-700); }
.card.failed { border-color: #b91c1c; } .dark .card.failed { border-color: #fca5a5; }
.card.done .state { color: #15803d; } .card.failed .state { color: #b91c1c; }
.dark .card.running .state, .dark .card.stopping .state { color: var(--primary-300); }
.dark .card.done .state { color: #4ade80; } .dark .card.failed .state { color: #fca5a5; }
.card .rail { height: 8px; border-radius: 99px; margin: 10px 0 6px; background: var(--border-color-primary);
  overflow: hidden; }
.card .rail div { height: 100%; border-radius: 99px; background: var(--primary-600); }
.card .fine { color: var(--body-text-color-subdued); font-size: 0.9em; margin: 4px 0 0; }
.card .why { margin: 6px 0 0; }
.card ul { margin: 6px 0 0; padding: 0 0 0 18px !important; list-style: disc; }
"""


def job_card(job: Job | None, line: Line, idle: str) -> str:
    """The card of a tab; ``idle`` is said where nothing has been asked for yet."""
    if job is None:
        return _card("idle", f'<div class="fine">{escape(idle)}</div>')
    mark = f"{_MARKS[job.state]} " if job.state in _MARKS else ""
    parts = [
        f'<div class="head"><span>{escape(job.title)}</span><span class="state">{mark}{_WORDS[job.state]}</span></div>'
    ]
    if job.state == WAITING:
        ahead = [*([line.current] if line.current else []), *line.waiting()]
        names = ", ".join(f"“{other.title}”" for other in ahead[: ahead.index(job)]) if job in ahead else ""
        parts.append(f'<p class="why">One job runs at a time. Before this one: {escape(names or "none")}.</p>')
    if job.state in (RUNNING, STOPPING):
        parts.append(_bar(job))
    if job.message:
        parts.append(f'<p class="why">{escape(_sentence(job.message))}</p>')
    if job.state == DONE:
        parts.append(f'<p class="fine">in {duration(job.ended - job.started)}</p>')
    if job.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(job.notes))
        parts.append(f'<ul class="fine">{notes}</ul>')
    return _card(job.state, "".join(parts))


def problem_card(text: str) -> str:
    """Why something that was asked for cannot be, beside where it was asked."""
    return _card("failed", f'<p class="why">✕ {escape(_sentence(text))}</p>') if text else ""


def now_line(line: Line) -> str:
    """One line over all tabs: what runs, for whichever window, and who waits."""
    job, waiting = line.current, line.waiting()
    if job is None:
        return '<div class="fine">Nothing is running.</div>'
    told = f"Running: {escape(job.title)}{escape(_counted(job))}"
    if waiting:
        told += f" · waiting: {escape(', '.join(other.title for other in waiting))}"
    return f'<div class="fine">{told}</div>'


def _bar(job: Job) -> str:
    if not job.total:
        return f'<p class="fine">{escape(job.stage or "starting")} …</p>'
    share = min(1.0, job.done / job.total)
    passed = time.monotonic() - job.since
    left = f" · about {duration(passed * (job.total - job.done) / job.done)} left" if job.done and passed > 2 else ""
    return (
        f'<div class="rail" role="progressbar" aria-valuenow="{100 * share:.0f}" aria-valuemin="0" '
        f'aria-valuemax="100"><div style="width:{100 * share:.1f}%"></div></div>'
        f'<p class="fine">{escape(job.stage)}{escape(_counted(job))}{escape(left)}</p>'
    )


def _counted(job: Job) -> str:
    return f" · {job.done} of {job.total}" if job.total else ""


def _card(state: str, inside: str) -> str:
    return f'<div class="card {state}">{inside}</div>'


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?", "…")) else ".")
