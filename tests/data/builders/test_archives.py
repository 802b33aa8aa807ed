"""Archives of archives: found, listed and read by byte range."""

import gzip

import pytest

from effnetv2_jax.data.builders import archives
from effnetv2_jax.data.builders.archives import DamagedTar, Member, synset_tars
from effnetv2_jax.errors import InputError
from tests.data import miniature_21k as miniature

FIRST, SECOND = miniature.DOG, miniature.CAT
LARGE = {
    synset: {f"{synset}_{i}.JPEG": bytes([i]) * 300_000 for i in range(3)}
    for synset in (FIRST, SECOND)
}


class CountingFile:
    """Notes every range of bytes that is read of a file."""

    def __init__(self, file):
        self.file, self.ranges = file, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def seek(self, position):
        return self.file.seek(position)

    def read(self, count):
        start = self.file.tell()
        content = self.file.read(count)
        self.ranges.append((start, start + len(content)))
        return content

    @property
    def num_bytes(self):
        return sum(end - start for start, end in self.ranges)


@pytest.fixture
def opened(monkeypatch):
    """All files that were opened for reading."""
    files, plain = [], archives.open_file

    def open_file(path):
        files.append(CountingFile(plain(path)))
        return files[-1]

    monkeypatch.setattr(archives, "open_file", open_file)
    return files


@pytest.mark.parametrize("with_folder", [True, False])
def test_the_archive_is_indexed_by_its_headers_alone(tmp_path, opened, with_folder):
    path = miniature.write_archive(tmp_path, classes=LARGE, with_folder=with_folder)
    tars = synset_tars(str(tmp_path), "winter21_whole")
    assert list(tars) == [FIRST, SECOND]
    assert sum(file.num_bytes for file in opened) < 10 * 512 < path.stat().st_size / 300
    whole = path.read_bytes()
    for synset, tar in tars.items():
        assert whole[tar.offset : tar.offset + tar.size] == miniature.tar_of(LARGE[synset])


def test_an_inner_tar_is_read_within_its_range_and_once(tmp_path, opened):
    path = miniature.write_archive(tmp_path, classes=LARGE)
    tar = synset_tars(str(tmp_path), "winter21_whole")[SECOND]
    with archives.open_file(str(path)) as file:
        contents = {m.name: archives.read_bytes(file, m) for m in archives.tar_members(file, tar)}
    assert contents == LARGE[SECOND]
    assert min(start for start, _ in file.ranges) >= tar.offset
    assert max(end for _, end in file.ranges) <= tar.offset + tar.size
    assert file.num_bytes <= tar.size


def test_a_tar_that_ends_without_a_mark_is_not_read_past_its_range(tmp_path):
    # Behind it in the outer file comes the header of the next tar.
    ends_with_image = miniature.tar_of({"a.JPEG": b"x" * 512})[:1024]
    path = tmp_path / "winter21_whole.tar"
    path.write_bytes(miniature.tar_of({f"{s}.tar": ends_with_image for s in (FIRST, SECOND)}))
    tar = synset_tars(str(tmp_path), "winter21_whole")[FIRST]
    with archives.open_file(str(path)) as file:
        assert [m.name for m in archives.tar_members(file, tar)] == ["a.JPEG"]


def test_a_folder_of_tars_and_a_plain_tar_called_gz_are_accepted(tmp_path):
    folder = tmp_path / "folder" / "fall11_whole"
    folder.mkdir(parents=True)
    for synset, files in LARGE.items():
        (folder / f"{synset}.tar").write_bytes(miniature.tar_of(files))
    (folder / "README.txt").write_text("not a tar")
    tars = synset_tars(str(tmp_path / "folder"), "fall11_whole")
    assert tars[FIRST] == Member(
        f"{FIRST}.tar", str(folder / f"{FIRST}.tar"), 0, len(miniature.tar_of(LARGE[FIRST]))
    )
    path = miniature.write_archive(tmp_path, classes=LARGE)
    path.rename(tmp_path / "winter21_whole.tar.gz")
    assert list(synset_tars(str(tmp_path), "winter21_whole")) == [FIRST, SECOND]


def test_a_missing_archive_says_where_it_is_expected(tmp_path):
    with pytest.raises(InputError) as caught:
        synset_tars(str(tmp_path), "winter21_whole")
    assert f"file '{tmp_path}/winter21_whole.tar'" in str(caught.value)
    assert f"folder '{tmp_path}/winter21_whole'" in str(caught.value)


def test_archives_that_cannot_be_used_are_refused(tmp_path):
    path = miniature.write_archive(tmp_path, classes=LARGE)
    whole = path.read_bytes()

    def refuses(content, message):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            synset_tars(str(tmp_path), "winter21_whole")

    refuses(gzip.compress(whole), "is compressed.*gunzip")
    refuses(whole[:1_000_000], f"ends inside '.*{SECOND}.tar'.*fetch it again")
    second_header = 512 + -(-len(miniature.tar_of(LARGE[FIRST])) // 512) * 512
    damaged = whole[:second_header] + b"?" * 512 + whole[second_header + 512 :]
    refuses(damaged, f"damaged header at byte {second_header}.*fetch it again")
    refuses(b"no tar at all" * 100, "fetch it again")
    refuses(miniature.tar_of({"photo.jpg": b""}), "holds no tar files of synsets")
    refuses(miniature.tar_of({f"{d}/{FIRST}.tar": b"" for d in "ab"}), f"holds {FIRST}.tar twice")


@pytest.mark.parametrize("content", [b"", miniature.tar_of({})], ids=["no bytes", "no members"])
def test_an_empty_tar_has_no_members(tmp_path, content):
    path = tmp_path / "empty.tar"
    path.write_bytes(content)
    with archives.open_file(str(path)) as file:
        tar = Member(path.name, str(path), 0, len(content))
        assert list(archives.tar_members(file, tar)) == []


def test_the_members_before_the_damage_are_given(tmp_path):
    path = tmp_path / "cut.tar"
    path.write_bytes(miniature.tar_of(LARGE[FIRST])[:700_000])
    found = []
    with archives.open_file(str(path)) as file, pytest.raises(DamagedTar, match=r"_2\.JPEG"):
        for member in archives.tar_members(file, Member(path.name, str(path), 0, 700_000)):
            found.append(archives.read_bytes(file, member))
    assert found == list(LARGE[FIRST].values())[:2]
