"""The file header against the oracle, its cost, and the refusal of other bytes."""

from __future__ import annotations

import random
import re
from binascii import crc_hqx
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oracles import independent_decoder as tables
from oracles.independent_coder import Symbol, encode, symbol_of
from oracles.independent_decoder import header_symbols, number
from percov2.container import bitstream
from percov2.container.bitstream import BitstreamError, Header, ParsedFile, read
from percov2.entropy.schedule import SCHEDULES

pytestmark = pytest.mark.core

# The rates that have a table entry of their own: r031, r010, r002 of the embedded model.
COMMON_RATES = 3

sides = st.one_of(st.integers(1, 2000), st.integers(1, 65536), st.sampled_from([512, 8192, 65536]))
captions = st.one_of(
    st.tuples(st.just(0), st.just(b"")),
    st.tuples(
        st.sampled_from([1, 2]),
        st.binary(min_size=1, max_size=80).filter(lambda b: not b.endswith(b"\0")),
    ),
)


def built(caption: tuple[int, bytes], seed: int, **fields: int) -> Header:
    seed = seed if fields["stages_sent"] else 0
    return Header(caption_codec=caption[0], caption=caption[1], seed=seed, **fields)


headers = st.builds(
    built,
    caption=captions,
    seed=st.one_of(st.just(0), st.integers(0, 65535)),
    model_id=st.integers(0, 65535),
    height=sides,
    width=sides,
    rate=st.integers(0, 15),
    schedule=st.integers(0, 6),
    stages_sent=st.one_of(st.just(0), st.integers(1, 65536)),
    dense=st.booleans(),
)


def plain(header: Header) -> tables.Header:
    """The same fields as the independent decoder has them."""
    return tables.Header(
        header.model_id,
        header.height,
        header.width,
        header.rate,
        header.schedule,
        header.stages_sent,
        header.seed,
        int(not header.dense),
        header.caption_codec,
    )


def plain_symbols(header: Header) -> list[Symbol]:
    return header_symbols(plain(header), header.caption)


def write(header: Header, tokens: list[Symbol], check: int) -> bytes:
    return tables.write(plain(header), header.caption, tokens, check)


def random_tokens(rng: random.Random, count: int) -> list[Symbol]:
    """Symbols of 1 to 14 bits, as an entropy model would give them."""
    symbols = []
    for _ in range(count):
        freq = int(2 ** rng.uniform(2, 15))
        symbols.append(Symbol(rng.randrange(2**16 - freq), freq, 16))
    return symbols


def a_file(header: Header, tokens: int = 100, seed: int = 0) -> bytes:
    rng = random.Random(seed)
    return write(header, random_tokens(rng, tokens), rng.randrange(2**16))


PLAIN = Header(model_id=0xBEEF, height=512, width=512)
FULL = Header(
    model_id=0x1234,
    height=1365,
    width=2048,
    rate=2,
    schedule=3,
    stages_sent=4,
    caption_codec=1,
    caption=b"a lighthouse",
    dense=False,
)

EXAMPLE = Header(0x1234, 33, 20, rate=2, schedule=4, caption_codec=1, caption=b"a lighthouse")
"""The example of docs/reference/bitstream.md: a uniform model of 256 codes, 16-pixel tokens."""
EXAMPLE_FILE = (
    "fc 21 12 34 03 cf ec 2e 40 60 3b d2 b2 06 c6 96 76 87 46 86 f7 57 36 57 03 03 fa 00 07 f1"
)


@given(header=headers, seed=st.integers(0, 2**32), count=st.integers(0, 40))
@example(header=PLAIN, seed=0, count=20)
@example(header=FULL, seed=0, count=20)
@settings(max_examples=200, deadline=None)
def test_headers_are_written_and_read_as_the_oracle_does(
    header: Header, seed: int, count: int
) -> None:
    expected = plain_symbols(header)
    assert bitstream.header_intervals(header) == [(s.start, s.freq) for s in expected]
    assert all(s.prob_bits == bitstream.PROB_BITS for s in expected)
    rng = random.Random(seed)
    tokens, check = random_tokens(rng, count), rng.randrange(2**16)
    data = write(header, tokens, check)
    parsed = read(data, max_pixels=2**32)
    assert parsed.header == header
    head, decoder = tables.open_file(data, max_pixels=2**32)
    assert head == plain(header)
    if head.caption_codec:
        assert tables.stored_caption(decoder) == header.caption
    # The state hands over to the tokens: they decode, and the check is what remains.
    assert (parsed.state, parsed.position) == (decoder.x, decoder.position)
    for start, freq, prob_bits in tokens:
        assert decoder.symbol([0, start, start + freq, 2**prob_bits], prob_bits) == 1
    assert decoder.finished(check)
    # Bits account for every symbol.
    bits = parsed.bits
    assert set(bits) == {"header", "caption", "check"}
    total = sum(s.information for s in expected)
    assert bits["header"] + bits["caption"] == pytest.approx(32 + total)
    length = number(tables.CAPTION_EXPONENT, len(header.caption)) if header.caption else []
    caption = sum(s.information for s in length) + 8 * len(header.caption)
    assert bits["caption"] == pytest.approx(caption)
    assert bits["check"] == 16


@given(header=headers, tokens=st.lists(st.integers(-1, 8191), max_size=30))
@settings(max_examples=100, deadline=None)
def test_check_equals_the_oracle(header: Header, tokens: list[int]) -> None:
    raw = b"".join(t.to_bytes(4, "little", signed=True) for t in tokens)
    assert bitstream.check(header, raw) == tables.check(plain(header), header.caption, tokens)


def test_golden_file() -> None:
    tokens = [7, 3, 3, 250, 0, 7]
    check = tables.check(plain(EXAMPLE), EXAMPLE.caption, tokens)
    data = write(EXAMPLE, [Symbol(256 * token, 256, 16) for token in tokens], check)
    assert check == 0x88F1
    assert data.hex(" ") == EXAMPLE_FILE
    assert read(data).header == EXAMPLE


def test_document_holds_these_tables_and_this_file() -> None:
    document = (Path(__file__).parents[2] / "docs" / "reference" / "bitstream.md").read_text(
        encoding="utf-8"
    )
    tables = dict(re.findall(r"^\| ([A-Z_]+) \| ([0-9 ,×]+) \|$", document, re.MULTILINE))
    assert len(tables) == 10
    for name, written in tables.items():
        freqs: list[int] = []
        for times, value in re.findall(r"(?:(\d+) × )?(\d+)", written):
            freqs += [int(value)] * int(times or 1)
        assert tuple(freqs) == getattr(bitstream, f"_{name}"), name
    assert f"    {EXAMPLE_FILE}\n" in document
    example = [(0, 1024), (3072, 512), (100, 1), (2048, 2048)]
    payload = encode(0xABCD, [Symbol(*s) for s in example])
    assert f"Payload: `{payload.hex(' ').upper()}`" in document
    assert crc_hqx(b"123456789", 0xFFFF) == 0x29B1


def excess_bytes(header: Header, files: int, seed: int) -> float:
    """Mean bytes of a file beyond the information in its tokens: header, check and overhead."""
    rng = random.Random(seed)
    total = 0.0
    for _ in range(files):
        tokens = random_tokens(rng, 12)
        data = write(header, tokens, rng.randrange(2**16))
        total += len(data) - sum(s.information for s in tokens) / 8
    return total / files


@pytest.mark.parametrize(
    ("sizes", "limit"),
    [
        ([(512, 512)], 7),
        ([(8192, 8192), (8191, 4097), (1, 1), (2, 8192), (768, 512), (4032, 3024)], 11),
        ([(5099, 340), (6071, 2896), (7507, 8190), (33, 1200), (4097, 4096)], 11),
    ],
)
def test_headers_cost_few_bytes(sizes: list[tuple[int, int]], limit: int) -> None:
    for size in sizes:
        costs = [
            excess_bytes(Header(77, *size, rate=rate, schedule=schedule), 20, 100 * rate + schedule)
            for rate in range(COMMON_RATES)
            for schedule in range(len(SCHEDULES))
        ]
        assert sum(costs) / len(costs) <= limit, size


def test_every_field_value_has_room_in_its_table() -> None:
    names = [name for name in vars(tables) if name.isupper() and hasattr(bitstream, f"_{name}")]
    assert {name: sum(getattr(bitstream, f"_{name}")) for name in names} == dict.fromkeys(
        names, 4096
    )
    assert len(names) == 10
    assert len(SCHEDULES) == bitstream.SCHEDULE_INDICES


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"\xfc", "too short: 1 bytes"),
        (b"\xfc\x21\x00", "too short: 3 bytes"),
        (b"hello, this is a text\n", "not a .pcv2 file: it starts with 68 65 6c 6c"),
        (b"h", "not a .pcv2 file"),
        (b"\xfc\x31\0\0\0", "not a .pcv2 file"),
        (b"\xff\xd8\xff\xe0 a jpeg", "not a .pcv2 file"),
        (b"\xfc\x22\0\0\0\0\0\0", "unsupported .pcv2 version 2"),
        (b"\xfc\x21\0\0\0\x80\0\0", "begins with a zero byte"),
        (b"\xfc\x20", "unsupported .pcv2 version 0"),
    ],
)
def test_prefix_faults_have_their_own_messages(data: bytes, message: str) -> None:
    with pytest.raises(BitstreamError, match=message):
        read(data)


def forged(*symbols: Symbol) -> bytes:
    return b"\xfc\x21\0\0" + encode(12345, symbols)


def test_large_image_names_the_limit() -> None:
    data = a_file(Header(1, 9000, 8000))
    with pytest.raises(BitstreamError, match=r"8000x9000 = 72000000 .*64000000.*max_pixels"):
        read(data)
    assert read(data, max_pixels=72_000_000).header.height == 9000
    with pytest.raises(BitstreamError, match="max_pixels"):
        read(data, max_pixels=71_999_999)


def test_impossible_fields_are_refused() -> None:
    table = symbol_of
    start = [table(tables.RATE, 0), table(tables.SCHEDULE, 0), table(tables.ALL_STAGES, 0)]
    standard = [table(tables.STANDARD_SIZE, 0), table(tables.DENSE, 0)]
    rest = [Symbol(0, 1, 12)] * 8
    with pytest.raises(BitstreamError, match="impossible header field: schedule 7"):
        read(forged(start[0], table(tables.SCHEDULE, 7), *rest))
    long_form = [*number(tables.SIDE_EXPONENT, 512), *number(tables.SIDE_EXPONENT, 512)]
    with pytest.raises(BitstreamError, match="512x512 in its long form"):
        read(forged(*start, table(tables.STANDARD_SIZE, 1), *long_form, *rest))
    for codec in (4, 5):
        coded = table(tables.CAPTION_CODEC, codec)
        with pytest.raises(BitstreamError, match=f"caption codec {codec} is not known"):
            read(forged(*start, *standard, coded, *rest))
    raw = table(tables.CAPTION_CODEC, 1)
    with pytest.raises(BitstreamError, match="a caption of 4000 coded bytes"):
        read(forged(*start, *standard, raw, *number(tables.CAPTION_EXPONENT, 4000), *rest))
    zero_at_end = [*number(tables.CAPTION_EXPONENT, 2), *[Symbol(0, 16, 12)] * 2]
    with pytest.raises(BitstreamError, match="last byte of the coded caption is zero"):
        read(forged(*start, *standard, raw, *zero_at_end, *rest))


def parsed_or_refused(data: bytes) -> ParsedFile | None:
    try:
        parsed = read(data)
    except BitstreamError:
        return None
    assert parsed.header.height * parsed.header.width <= bitstream.MAX_PIXELS
    assert 4 <= parsed.position <= len(data)
    assert parsed.state >= 2**23 or parsed.position == len(data)
    assert parsed.state < 2**31
    return parsed


@given(data=st.binary(max_size=200), with_magic=st.booleans())
@settings(max_examples=1000, deadline=None)
def test_any_bytes_parse_or_are_refused(data: bytes, with_magic: bool) -> None:
    parsed_or_refused(b"\xfc\x21" + data if with_magic else data)


@pytest.mark.parametrize("header", [PLAIN, FULL])
def test_every_truncation_and_bit_flip_parses_or_is_refused(header: Header) -> None:
    data = a_file(header)
    assert parsed_or_refused(data) is not None
    for length in range(len(data)):
        parsed_or_refused(data[:length])
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 128 >> bit % 8
        parsed = parsed_or_refused(bytes(flipped))
        if bit < 16:
            assert parsed is None
        elif bit < 32:
            assert parsed is not None
            assert parsed.header.model_id != header.model_id


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_id": 65536}, "model_id must be 0..65535, got 65536"),
        ({"height": 0}, "height must be 1..65536, got 0"),
        ({"width": 65537}, "width must be"),
        ({"rate": 16}, "rate must be 0..15"),
        ({"schedule": 7}, "schedule must be 0..6"),
        ({"stages_sent": -1}, "stages_sent must be"),
        ({"seed": 1}, "seed must be 0..0, got 1"),
        ({"stages_sent": 1, "seed": 65536}, "seed must be 0..65535, got 65536"),
        ({"caption_codec": 4, "caption": b"x"}, "caption_codec must be 0..3"),
        ({"caption_codec": 1}, "does not go with 0 caption bytes"),
        ({"caption": b"x"}, "codec 0 does not go with 1 caption bytes"),
        ({"caption_codec": 1, "caption": b"x" * 4097}, "at most 4096 bytes, got 4097"),
        ({"caption_codec": 1, "caption": b"x\0"}, "must not be zero"),
    ],
)
def test_header_refuses_values_that_cannot_be_written(
    fields: dict[str, object], message: str
) -> None:
    values: dict[str, object] = {"model_id": 1, "height": 10, "width": 10, **fields}
    with pytest.raises(ValueError, match=message):
        Header(**values)  # type: ignore[arg-type]


def test_dense_promise() -> None:
    kept = {(512, 0, 512): True, (513, 0, 0): False, (520, 1, 512): True, (520, 1, 513): False}
    assert {given: bitstream.keeps_dense_promise(*given) for given in kept} == kept


def captioned(caption: bytes) -> Header:
    return Header(0, 512, 512, caption_codec=1, caption=caption)


# No tokens follow: the tightest case of the early refusal of a caption.
@given(header=headers, check=st.sampled_from([0, 1, 2, 3, 15, 4711, 65535]))
@example(header=captioned(b"\x01"), check=0)
@example(header=captioned(b"\0" * 50 + b"\x01"), check=0)
@example(header=captioned(b"\xff" * 50), check=65535)
@example(header=Header(0, 32769, 1), check=0)
@example(header=Header(0, 1, 32769), check=0)
@example(header=Header(0, 1, 1), check=0)
@example(header=Header(0, 32769, 32769, 0, 0, 32769), check=0)
@example(header=Header(0, 512, 512, 0, 0, 32769), check=0)
@settings(max_examples=250, deadline=None)
def test_headers_round_trip_where_the_check_is_small_and_no_token_follows(
    header: Header, check: int
) -> None:
    data = write(header, [], check)
    assert read(data, max_pixels=2**32).header == header
