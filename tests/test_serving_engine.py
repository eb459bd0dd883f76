# SPDX-License-Identifier: Apache-2.0
"""What requests may ask for, and that none of them harms another."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from offsite_ray.architectures import load_model, load_tokenizer
from offsite_ray.config import Limits
from offsite_ray.emulator import open_full_model
from offsite_ray.errors import BusyError, RequestError
from offsite_ray.serving.tenants import read_own
from tests.served import Tenants, ask, generated, held, make_tenants, serve
from tests.tiny_models import save_tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from offsite_ray.serving.engine import Engine

PROMPT = (5, 9, 60, 31)


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return make_tenants("gpt2", tmp_path_factory.mktemp("tenants"))


@pytest.fixture
def served(tenants: Tenants) -> Iterator[tuple[Engine, dict[str, int]]]:
    engine, numbers = serve(tenants, Limits(max_rows=4, cache_tokens=512, max_queue=6))
    yield engine, numbers
    engine.stop()


def test_log_probabilities_are_those_of_the_plugged_in_model(
    tenants: Tenants, served: tuple[Engine, dict[str, int]]
) -> None:
    engine, numbers = served
    answers = {
        name: ask(engine, numbers[name], PROMPT, max_tokens=6, logprobs=3, ignore_eos=True)
        for name in tenants.plugged_in
    }
    for name, answer in answers.items():
        assert answer.done.wait(30)
        model = load_model(tenants.plugged_in[name])
        with torch.no_grad():
            whole = model(torch.tensor([[*PROMPT, *answer.tokens()]])).logits[0].float()
        expected = torch.log_softmax(whole, -1)[len(PROMPT) - 1 :]
        for place, piece in enumerate(answer.pieces):
            (found,) = piece.logprobs
            assert found.logprob == pytest.approx(float(expected[place, found.token]), abs=1e-5)
            assert [*found.top] == expected[place].topk(3).indices.tolist()


def test_a_seed_draws_the_same_whoever_shares_the_batch(
    served: tuple[Engine, dict[str, int]],
) -> None:
    engine, numbers = served
    wish: dict[str, Any] = {
        "max_tokens": 10,
        "temperature": 1.2,
        "top_p": 0.9,
        "top_k": 40,
        "seed": 3,
    }
    alone = ask(engine, numbers["full"], PROMPT, ignore_eos=True, **wish)
    assert alone.done.wait(30)
    crowd = [
        ask(engine, numbers["lora"], (7, i), max_tokens=12, seed=i, temperature=1) for i in range(3)
    ]
    again = ask(engine, numbers["full"], PROMPT, ignore_eos=True, **wish)
    other = ask(engine, numbers["full"], PROMPT, ignore_eos=True, **{**wish, "seed": 4})
    assert again.done.wait(30)
    assert other.done.wait(30)
    assert all(answer.done.wait(30) for answer in crowd)
    assert again.tokens() == alone.tokens() != other.tokens()


def test_several_texts_of_a_prompt_differ(served: tuple[Engine, dict[str, int]]) -> None:
    engine, numbers = served
    answer = ask(engine, numbers["full"], PROMPT, n=3, seed=1, temperature=1.0, max_tokens=8)
    assert answer.done.wait(30)
    assert len({tuple(answer.tokens(index)) for index in range(3)}) == 3
    wait_until(lambda: engine.num_running == 0)


def test_a_text_ends_before_a_stop_string(
    tenants: Tenants, served: tuple[Engine, dict[str, int]]
) -> None:
    engine, numbers = served
    free = ask(engine, numbers["full"], PROMPT, max_tokens=20, ignore_eos=True)
    assert free.done.wait(30)
    text = free.text()
    assert text == load_tokenizer(tenants.full).decode(free.tokens(), skip_special_tokens=True)
    stop = text[7:10]
    short = ask(engine, numbers["full"], PROMPT, max_tokens=20, ignore_eos=True, stop=(stop,))
    assert short.done.wait(30)
    assert short.text() == text[: text.index(stop)]
    assert short.finish() == "stop"
    assert free.finish() == "length"


def test_a_cancelled_request_frees_its_place_at_once(
    served: tuple[Engine, dict[str, int]],
) -> None:
    engine, numbers = served
    begun, cancelled = threading.Event(), threading.Event()

    def at_piece() -> None:
        begun.set()
        cancelled.wait(30)

    wish: dict[str, Any] = {"max_tokens": 50, "ignore_eos": True, "at_piece": at_piece}
    with held(engine):
        long = [ask(engine, numbers["full"], PROMPT, **wish) for _ in range(4)]
        waits = ask(engine, numbers["lora"], PROMPT, max_tokens=2, ignore_eos=True)
    assert begun.wait(30)
    for answer in long:
        assert answer.request is not None
        engine.cancel(answer.request)
    cancelled.set()
    assert waits.done.wait(30)
    assert len(waits.tokens()) == 2
    # what was told after the wish is what was computed before it
    assert sum(len(answer.pieces) for answer in long) == 1
    wait_until(lambda: engine.num_running == 0)


@pytest.mark.parametrize(
    ("prompt", "sampling", "said"),
    [
        ((), {}, "no token"),
        ((5, 128), {}, "not below 128"),
        ((5, -1), {}, "not below 128"),
        (tuple(range(60)), {}, "shorten the prompt"),
        (PROMPT, {"n": 5}, "up to 4 are allowed"),
        (PROMPT, {"temperature": -1.0}, "temperature is -1.0; it must be 0, or from"),
        (PROMPT, {"top_p": 0.0}, "top_p is 0.0"),
        (PROMPT, {"stop": ("",)}, "none of them empty"),
        (PROMPT, {"max_tokens": 0}, "at least 1"),
        (PROMPT, {"seed": 2**64}, "seed is 18446744073709551616; it must be from 0"),
        (PROMPT, {"temperature": 1e-40}, "0, or from 0.01 to 2"),
        (PROMPT, {"max_tokens": 9000}, "max_tokens takes 9000; up to"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_harms_nobody(
    served: tuple[Engine, dict[str, int]],
    prompt: tuple[int, ...],
    sampling: dict[str, Any],
    said: str,
) -> None:
    engine, numbers = served
    neighbour = ask(engine, numbers["full"], PROMPT, max_tokens=8, ignore_eos=True)
    with pytest.raises(RequestError, match=said):
        ask(engine, numbers["full"], prompt, **sampling)
    assert neighbour.done.wait(30)
    assert len(neighbour.tokens()) == 8


def test_a_full_queue_refuses(served: tuple[Engine, dict[str, int]]) -> None:
    engine, numbers = served
    with held(engine):
        # four for the rows, which are free, and six behind them
        waiting = [ask(engine, numbers["full"], PROMPT, max_tokens=2) for _ in range(10)]
        with pytest.raises(BusyError, match="all places are taken"):
            ask(engine, numbers["full"], PROMPT)
        # Who has none there gets the last place of who has most; the second one no more.
        others = [ask(engine, numbers[name], PROMPT, max_tokens=2) for name in ("lora", "base")]
        with pytest.raises(BusyError, match="all places are taken"):
            ask(engine, numbers["lora"], PROMPT)
    assert all(answer.done.wait(30) for answer in (*waiting, *others))
    assert [answer.finish() for answer in (*waiting, *others)] == [
        *["length"] * 8, "busy", "busy", "length", "length"
    ]  # fmt: skip
    with held(engine):  # what is free they may take at once, but wait for nothing so soon
        later = [ask(engine, numbers["full"], PROMPT, max_tokens=2) for _ in range(4)]
        with pytest.raises(BusyError, match="all places are taken"):
            ask(engine, numbers["full"], PROMPT)
        calm = ask(engine, numbers["bitfit"], PROMPT, max_tokens=2)
    assert all(answer.done.wait(30) for answer in (*later, calm))
    assert {answer.finish() for answer in (*later, calm)} == {"length"}


def test_who_asks_an_engine_that_has_ended_is_not_left_waiting(
    served: tuple[Engine, dict[str, int]],
) -> None:
    engine, numbers = served
    at_piece = threading.Event()
    begun = ask(engine, numbers["full"], PROMPT, max_tokens=50, at_piece=at_piece.set)
    assert at_piece.wait(30)
    engine.stop()
    assert begun.done.wait(30)
    with pytest.raises(BusyError, match="has ended"):
        ask(engine, numbers["full"], PROMPT)


def test_a_tenant_that_floods_keeps_nobody_waiting(
    served: tuple[Engine, dict[str, int]],
) -> None:
    engine, numbers = served
    wish: dict[str, Any] = {"ignore_eos": True}
    for name in ("full", "lora"):  # so that both are in the model
        assert ask(engine, numbers[name], PROMPT, max_tokens=1, **wish).done.wait(30)
    with held(engine):
        flood = [ask(engine, numbers["full"], PROMPT, max_tokens=30, **wish) for _ in range(5)]
        quiet = ask(engine, numbers["lora"], PROMPT, max_tokens=5, **wish)
    assert all(answer.done.wait(30) for answer in [*flood, quiet])
    # it came last, and was let in second
    assert quiet.finished_at < min(answer.finished_at for answer in flood)


def test_a_failing_step_is_told_and_the_engine_goes_on(
    served: tuple[Engine, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, numbers = served
    right = engine._batch._model.forward
    monkeypatch.setattr(engine._batch._model, "forward", lambda *_: 1 / 0)
    broken = ask(engine, numbers["full"], PROMPT)
    assert broken.done.wait(30)
    assert broken.finish() == "error"
    monkeypatch.setattr(engine._batch._model, "forward", right)
    after = ask(engine, numbers["full"], PROMPT, max_tokens=3, ignore_eos=True)
    assert after.done.wait(30)
    assert len(after.tokens()) == 3
    assert engine.is_healthy()


def test_an_engine_that_fails_at_every_request_is_not_healthy_however_seldom_they_come(
    served: tuple[Engine, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, numbers = served
    monkeypatch.setattr(engine._batch._model, "forward", lambda *_: 1 / 0)
    for _ in range(3):
        assert engine.is_healthy()
        assert ask(engine, numbers["full"], PROMPT).done.wait(30)
        with held(engine):  # a step without work
            pass
    wait_until(lambda: not engine.is_healthy())


def test_a_prompt_of_several_parts_is_computed_whatever_their_size(tmp_path: Path) -> None:
    full = save_tiny(
        "gpt2", tmp_path / "full", tie_word_embeddings=False, max_position_embeddings=400
    )
    tenants = make_tenants("gpt2", tmp_path, ["full"], full=full)
    engine, numbers = serve(tenants, Limits(prefill_tokens=100, cache_tokens=2048))
    prompt = [(7 * number) % 90 + 3 for number in range(350)]
    answer = ask(engine, numbers["full"], prompt, max_tokens=8, ignore_eos=True)
    assert answer.done.wait(60)
    assert answer.tokens() == generated(tenants.plugged_in["full"], prompt, 8)
    engine.stop()


def test_a_version_is_removed_once_its_last_request_is_answered(
    tenants: Tenants, served: tuple[Engine, dict[str, int]]
) -> None:
    engine, numbers = served
    last = ask(engine, numbers["full"], PROMPT, max_tokens=20, ignore_eos=True)
    gone = engine.residency.remove(numbers["full"], engine.do)
    with pytest.raises(RequestError, match="no longer served"):
        ask(engine, numbers["full"], PROMPT)
    assert last.done.wait(30)
    gone.result(30)
    assert last.tokens() == generated(tenants.plugged_in["full"], PROMPT, 20)
    base = ask(engine, numbers["base"], PROMPT, max_tokens=5, ignore_eos=True)
    assert base.done.wait(30)
    assert base.tokens() == generated(tenants.full, PROMPT, 5)


def test_the_least_recently_used_tenant_makes_room(tenants: Tenants) -> None:
    engine, numbers = serve(tenants, Limits(cache_tokens=512), max_tenant_bytes=1)
    for _ in range(2):
        for name in ("full", "lora", "bottleneck"):
            answer = ask(engine, numbers[name], PROMPT, max_tokens=4, ignore_eos=True)
            assert answer.done.wait(30)
            assert answer.tokens() == generated(tenants.plugged_in[name], PROMPT, 4)
    assert engine.residency.num_brought == 6
    assert engine.residency.num_evicted == 5
    engine.stop()


def wait_until(is_so: object, seconds: float = 30.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_rows_come_and_go_for_long(served: tuple[Engine, dict[str, int]]) -> None:
    engine, numbers = served
    wishes: list[dict[str, Any]] = [
        {"n": 2, "temperature": 1.5, "seed": seed, "max_tokens": 50 + seed} for seed in range(6)
    ]
    alone = []
    for wish in wishes:
        answer = ask(engine, numbers["full"], PROMPT, ignore_eos=True, **wish)
        assert answer.done.wait(30)
        alone.append([answer.text(index) for index in range(2)])
    # The first text of each ends before the second; the columns in use wander on all the time.
    stops = [texts[0][34:38] for texts in alone]
    crowd = [
        ask(engine, numbers["full"], PROMPT, ignore_eos=True, stop=(stop,), **wish)
        for stop, wish in zip(stops, wishes, strict=True)
    ]
    for answer, texts, stop in zip(crowd, alone, stops, strict=True):
        assert answer.done.wait(60)
        assert answer.finish() == "stop"
        for index, text in enumerate(texts):
            assert answer.text(index) == text.partition(stop)[0]


def test_a_version_that_comes_back_while_it_is_on_its_way_out_stays(
    tenants: Tenants, served: tuple[Engine, dict[str, int]]
) -> None:
    engine, numbers = served
    number = numbers["full"]
    whole = ask(engine, number, PROMPT, max_tokens=40, ignore_eos=True)
    assert whole.done.wait(30)
    running = ask(engine, number, PROMPT, max_tokens=40, ignore_eos=True)
    engine.residency.remove(number, engine.do)
    engine.residency.add(number, read_own(tenants.adapters["full"], open_full_model(tenants.full)))
    again = ask(engine, number, PROMPT, max_tokens=40, ignore_eos=True)
    assert running.done.wait(30)
    assert again.done.wait(30)
    assert running.tokens() == again.tokens() == whole.tokens()


def test_tenants_have_no_more_room_than_is_allowed(tenants: Tenants) -> None:
    full = open_full_model(tenants.full)
    own = read_own(tenants.adapters["full"], full)
    engine, _ = serve(tenants, max_tenant_bytes=2 * own.nbytes)
    seen = 0
    try:
        many = range(100, 106)
        for number in many:
            engine.residency.add(number, own)

        def look() -> None:
            nonlocal seen
            seen = max(seen, engine.residency.bytes_here)

        answers = [
            ask(engine, number, PROMPT, max_tokens=6, at_piece=look) for number in (*many, *many)
        ]
        assert all(answer.done.wait(60) for answer in answers)
        assert len({tuple(answer.tokens()) for answer in answers}) == 1
    finally:
        engine.stop()
    assert own.nbytes <= seen <= 2 * own.nbytes
    assert engine.residency.num_evicted >= 4
