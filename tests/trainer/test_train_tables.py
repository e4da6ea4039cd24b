"""Training sets that are tables: what is told of them without a library, and what pyarrow reads."""

from __future__ import annotations

import base64
import builtins
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import COLORS, png, put
from xflux_trainer import parquet, tables
from xflux_trainer.errors import DataError
from xflux_trainer.samples import find_samples, survey

PARQUET = zlib.decompress(base64.b85decode(
    'c-jka3^EjD5q-iX`iap;^aP_QgAfCQ##a5m37Z&enHe4(7vjGlD$T&4;9B;63a5sGDsz2D$AdK)F{kRoO!S`C0g0m^VkwAd1re!W'
    'F?(&P>6hk<_If9N*u1DvQi*ATfS^O-3V|2zWFK4?5O~I{la!N|wQJt2b<3AYuXVmxIF0$CCaWj|$O*R?bwHGWD4Qso3<JbD3Mq=r'
    '49q~z2}UM%>4t^`2Mr0nj+Uf@85VLAI#QfgM(EAxNjv<q!fwHY3>U4Lek-PA9nIPqw_!$(+v=NnJLcpafBm!Wz=8q~9jX2kONvhB'
    'Sk1q%qQq-$)cPB1%1*zn+W%lf1rN}CwM8s4qCAqO3~U0D8myVQiRr1VNtGq3#iBf7Cm6+k@rcc0QJcf0#-XVL3^xW*CI%oO0Hhcg'
    'z<ePeAOQ<R1qMb2h`bUOFL5|BK)uAspf-UG-CCA{#F7k%ts!C+YR6dBX0T$lR7KRx2WT+dQlW_q3?Qjw12Aa_CXIkP+(a#~I74|Z'
    '149PX9Zb?Ho|Ax%*3#ot+rj~NkpxRgYDEdeE$bM?HZiJQVOMKn$Lbm`Q5hdmCWLEPH5ovmz>o-31av7D2Y}oQu^&n?GXj}vTe#r%'
    'Td<TQrWdp1WEPjOr{<*QrshE%QzSNxQSBP1+B{CIZaKgs`UovqD=^tIGi-7PChMg@%N!;JdCe4ZUVMblzFB}Nz(h#zyLfNQ>8sst'
    'hn~K0Reo6XdC|lI%gT!$J7V@^sKlJpm*SlM8YKAxD8AE>Ly>_o36!YWfQec~zU20?jM(qjHoe=M#ru8g6sEzDoDcBhOU~E$#JX72'
    'cJZoh<EC<Y-XKUIJwFpr+aW+&dWNQCNZKYjJzo*Vlb*i_sVx$sZF;^UN@RNeCZe`agwpg}Peyt+9Rlh3ffV8Nd`m*@ni!SS^930K'
    '>A6it?S?dI>DdUmlqNYnf04tJo~OvE9g?MOdj6t7WO|;apmt9ln_DD%Oc^BDijy-^a}!0`7)+TYAR#Nt!XV0{3gm%f7QzOHwkm@U'
    '$W;&lke8tXrXViR1wenX`PhI2SR}x%0oeyq409D!z1R&FNgGKY3hH{Y>ua*ARf_9Ev3LAHC2AaEx7bA(7=S*fpjsfiXeX-#rnuM?'
    'J0%G6`ZjK{Q|uy4Aiq;kgpgefkd<30&SFr%UlRlQorOU|p&+rSur#$qH@TodH?gQFzg(d#wWv5VKTpBXT+cwyKoXQa;D}){Fuw-?'
    'dk6qj2iY+'
))  # fmt: skip
"""300 rows in three groups, columns image {bytes, path}, text and tags [string]; written by pyarrow 17."""


def table(folder: Path, name: str = "train.parquet", data: bytes = PARQUET) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


def test_rows_and_columns_are_told_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(tmp_path / "deep")
    forbid(monkeypatch, "pyarrow")
    seen = survey(tmp_path)
    assert (seen.count, seen.problems) == (300, ())
    assert [(t.rows, t.columns) for t in seen.tables] == [(300, ("image", "text", "tags"))]
    (problem,) = survey(tmp_path, columns=("image", "caption")).problems
    assert problem.kind == "no-column"
    assert "only image, text, tags" in problem.seen
    (problem,) = find_samples(tmp_path).problems
    assert "pip install pyarrow" in problem.hint


def test_a_table_beside_images_is_read_with_them(tmp_path: Path) -> None:
    table(tmp_path)
    table(tmp_path, "metadata.parquet", b"of datasets' ImageFolder: it says things of the files")
    put(tmp_path, "a.png")
    seen = survey(tmp_path)
    assert (seen.count, seen.problems, len(seen.tables)) == (301, (), 1)


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", PARQUET[:-1], PARQUET[: len(PARQUET) // 2], PARQUET[:-30] + b"PAR1", b"x" * 100,
             PARQUET[:-8] + b"\xff\xff\xff\x7fPAR1", PARQUET[:-939] + b"\xff" * 100 + PARQUET[-839:],
             PARQUET[:-939] + b"\x1c" * 931 + PARQUET[-8:]],
)  # fmt: skip
def test_a_broken_table_is_a_problem_and_no_crash(tmp_path: Path, data: bytes) -> None:
    table(tmp_path, data=data)
    assert [problem.kind for problem in survey(tmp_path).problems] == ["bad-table"]


def test_of_several_splits_one_must_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    (problem,) = survey(tmp_path).problems
    assert problem.seen == "holds the splits train, test of a saved dataset"
    folder = tmp_path / "train"
    table(folder, "data-00000-of-00001.arrow", b"x")
    table(folder, "cache-123.arrow", b"x")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text(
        json.dumps({"features": {"image": {}, "text": {}}, "splits": {"train": {"num_examples": 7}}})
    )
    seen = survey(folder)
    assert [(t.path.name, t.columns) for t in seen.tables] == [("data-00000-of-00001.arrow", ("image", "text"))]
    assert seen.problems == ()
    (folder / "data-00000-of-00001.arrow").unlink()
    assert survey(folder).problems[0].kind == "no-table"


def test_a_small_number_of_rows_in_an_arrow_file_is_told_by_its_info(tmp_path: Path) -> None:
    table(tmp_path, "data-00000-of-00001.arrow", b"x")
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"features": {"image": {}, "text": {}}, "splits": {"train": {"num_examples": 7}}})
    )
    assert survey(tmp_path).count == 7


def forbid(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if the package were not installed."""
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)


# With pyarrow --------------------------------------------------------------------------------------------


def colors(folder: Path, kind: str, cells: str = "struct") -> Path:
    """Four squares as a table, in two row groups."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images: Any = [png(64, 64, color) for color in COLORS.values()]
    if cells == "struct":
        shape = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        images = pa.array([{"bytes": image, "path": "x.png"} for image in images], shape)
    elif cells == "paths":
        for name, image in zip(COLORS, images, strict=True):
            put(folder / "files.d", f"{name}.png", None, image)
        images = [f"files.d/{name}.png" for name in COLORS]
    rows = pa.table({"image": images, "text": [f"a {name} square" for name in COLORS], "other": [1, 2, 3, 4]})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"data.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        pq.write_table(rows, path, row_group_size=2)
    else:
        make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with make(str(path), rows.schema) as writer:
            writer.write_table(rows, max_chunksize=3)
    return path


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
@pytest.mark.parametrize("cells", ["struct", "bytes"])
def test_rows_are_samples(tmp_path: Path, kind: str, cells: str) -> None:
    path = colors(tmp_path / "set", kind, cells)
    index = find_samples(tmp_path / "set")
    assert index.problems == ()
    assert [(s.name.name, s.caption) for s in index.samples] == [
        (f"{path.name}#{row}", f"a {name} square") for row, name in enumerate(COLORS)
    ]
    wanted = [png(64, 64, color) for color in COLORS.values()]
    assert dict(parquet.read_images(path, "image", [1, 3])) == {1: wanted[1], 3: wanted[3]}
    with pytest.raises(DataError, match="has 4 rows"):
        list(parquet.read_images(path, "image", [9]))


def test_paths_in_a_table_are_taken_from_where_it_lies(tmp_path: Path) -> None:
    path = colors(tmp_path / "set", "parquet", "paths")
    assert next(parquet.read_images(path, "image", [2])) == (2, png(64, 64, COLORS["blue"]))
    (tmp_path / "set" / "files.d" / "blue.png").unlink()
    with pytest.raises(DataError, match=r"blue\.png, which cannot be read"):
        list(parquet.read_images(path, "image", [2]))


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = pa.table({"image": [png(), None, png(), b"x"], "text": ["a", "b", None, " "]})
    pq.write_table(rows, tmp_path / "a.parquet")
    index = find_samples(tmp_path)
    assert [(p.path.name, p.kind) for p in index.problems] == [
        ("a.parquet#2", "bad-caption"), ("a.parquet#3", "empty-caption"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="#1 holds no image"):
        list(parquet.read_images(tmp_path / "a.parquet", "image", [1]))
    (problem,) = find_samples(tmp_path, columns=("image", "caption")).problems
    assert problem.kind == "no-column"
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20] + b"\0" * 12 + b"\1\0\0\0PAR1")
    assert [problem.kind for problem in find_samples(tmp_path).problems] == ["bad-table"]


def test_a_table_is_encoded_as_the_files_would_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same four squares as files and as rows have the same entries; and a second start reads no image."""
    pytest.importorskip("diffusers")
    from cache_kit import config, fill, older
    from trainer_kit import squares

    path = colors(tmp_path / "images", "parquet")
    older(path)
    run = config(tmp_path)
    rows = fill(run)
    assert "encoded 4 images" in capsys.readouterr().out
    squares(tmp_path / "files")
    files = fill(config(tmp_path, img_dir=str(tmp_path / "files")))
    assert capsys.readouterr().out == ""
    assert {entry.latents for entry in rows} == {entry.latents for entry in files}
    assert {(entry.latents, entry.text) for entry in rows} == {(entry.latents, entry.text) for entry in files}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "read_images", lambda *_: pytest.fail("an image was read again"))
        assert fill(run) == rows


def test_the_tables_of_a_folder_are_listed_by_name() -> None:
    assert tables.saved_files("x", ["b.parquet", "a.PARQUET", "cache-1.arrow", "n.txt"]) == (
        ["a.PARQUET", "b.parquet"], None,
    )  # fmt: skip
