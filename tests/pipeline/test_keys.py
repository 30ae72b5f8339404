import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import keys
from pipeline.config import AnswerConfig
from pipeline.storage import ObjectInfo

S3_OBJECT = ObjectInfo("s3://bucket/folder/a b#1.mp4", 123, "9b2cf5", 0)
LOCAL_FILE = ObjectInfo("/data/videos/folder/ä.mp4", 123, "", 1_700_000_000_000_000_001)

ingredients = st.dictionaries(
    st.text(max_size=8),
    st.text(max_size=8) | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    max_size=6,
)


def test_keys_never_change() -> None:
    """A failure here means that every cache and every output in the world is orphaned."""
    assert (
        keys.video_key(S3_OBJECT, root="s3://bucket/folder")
        == "aa3ac14c998d4a8b0d640f11ff208ee67cabbc76848d4eb8ff6b89d56d77549e"
    )
    assert (
        keys.video_key(LOCAL_FILE, root="/data/videos")
        == "4a841b31489760fe403e30e76b2949dc7b97c52093ce3af677bb2a091d976fd9"
    )
    assert (
        keys.video_key(LOCAL_FILE, root="/data", content_sha256="ab" * 32)
        == "ee8ef13083e77c379598432aff49c415ef3a720d369ab9eb0e88c5becd260e5d"
    )
    assert (
        keys.missing_key("s3://bucket/gone.mp4")
        == "8349dc140b652374cf3aad198d21ae053f7594d11d7245b978b6de47eee39483"
    )
    assert keys.prompt_id("What is heard?") == "cd77ce148ddd2740"
    assert (
        keys.fingerprint({"model": "m", "retain": 0.25, "fps": 2, "audio": True})
        == "2a7a0635f50784be3c3b739056a7b70e118165c53ac6b7fc190cf20be17a6feb"
    )
    assert (
        keys.answer_fingerprint("ab" * 32, AnswerConfig(system_prompt="s", max_new_tokens=7))
        == "92fffba5e108a79a6c098ce99e3d20cf5711d14e6323ad3bad76f360f093a7e9"
    )


def test_the_definitions_are_those_of_the_documents() -> None:
    def sha(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    uri = json.dumps(S3_OBJECT.uri)
    assert keys.video_key(S3_OBJECT, root="") == sha(f'["s3", {uri}, "9b2cf5", 123]')
    local = '["local", "folder/\\u00e4.mp4", 123, 1700000000000000001]'
    assert keys.video_key(LOCAL_FILE, root="/data/videos/") == sha(local)
    assert keys.prompt_id("ä") == sha("ä")[:16]
    assert keys.fingerprint({"b": 1, "a": "x"}) == sha('{"a":"x","b":1}')


@pytest.mark.parametrize("change", [{"etag": "other"}, {"size_bytes": 124}, {"uri": "s3://b/x"}])
def test_a_changed_s3_object_has_another_key(change: dict[str, object]) -> None:
    changed = replace(S3_OBJECT, **change)  # type: ignore[arg-type]
    assert keys.video_key(changed, root="") != keys.video_key(S3_OBJECT, root="")


@pytest.mark.parametrize("change", [{"mtime_ns": 5}, {"size_bytes": 4}, {"uri": "/data/videos/b"}])
def test_a_changed_local_file_has_another_key(change: dict[str, object]) -> None:
    changed = replace(LOCAL_FILE, **change)  # type: ignore[arg-type]
    known = keys.video_key(LOCAL_FILE, root="/data/videos")
    assert keys.video_key(changed, root="/data/videos") != known


def test_a_local_corpus_keeps_its_keys_when_its_folder_moves() -> None:
    moved = replace(LOCAL_FILE, uri="/mnt/elsewhere/folder/ä.mp4")
    known = keys.video_key(LOCAL_FILE, root="/data/videos")
    assert keys.video_key(moved, root="file:///mnt/elsewhere/") == known


def test_a_copy_has_the_key_of_its_content() -> None:
    copy = replace(LOCAL_FILE, uri="/data/videos/copy.mp4", mtime_ns=7)
    of_copy = keys.video_key(copy, root="/data", content_sha256="c" * 64)
    assert of_copy == keys.video_key(LOCAL_FILE, root="/data", content_sha256="c" * 64)


def test_credentials_are_in_no_key() -> None:
    secret = replace(S3_OBJECT, uri="s3://user:secret@bucket/folder/a b#1.mp4")
    assert keys.without_credentials(secret.uri) == S3_OBJECT.uri
    assert keys.video_key(secret, root="") == keys.video_key(S3_OBJECT, root="")
    assert keys.without_credentials("s3://bucket/at@sign.mp4") == "s3://bucket/at@sign.mp4"


def test_quotes_around_an_etag_do_not_matter() -> None:
    quoted = replace(S3_OBJECT, etag='"9b2cf5"')
    assert keys.video_key(quoted, root="") == keys.video_key(S3_OBJECT, root="")


@given(ingredients, st.data())
def test_any_changed_ingredient_changes_the_fingerprint(
    known: dict[str, str | int | float], data: st.DataObject
) -> None:
    changed = data.draw(ingredients)
    same = json.dumps(known, sort_keys=True) == json.dumps(changed, sort_keys=True)
    assert (keys.fingerprint(known) == keys.fingerprint(changed)) == same


@given(ingredients)
def test_the_order_of_ingredients_is_irrelevant(known: dict[str, str | int | float]) -> None:
    turned = dict(reversed(known.items()))
    assert keys.fingerprint(turned) == keys.fingerprint(known)


def test_a_fingerprint_of_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        keys.fingerprint({"retain": float("nan")})


def test_only_settings_that_change_a_text_change_the_answer_fingerprint() -> None:
    base = AnswerConfig()
    known = keys.answer_fingerprint("a", base)
    for changed in (replace(base, system_prompt="x"), replace(base, max_new_tokens=1)):
        assert keys.answer_fingerprint("a", changed) != known
    assert keys.answer_fingerprint("b", base) != known
    assert keys.answer_fingerprint("a", replace(base, batch_videos=9, prompt="other")) == known
    # nor does what one engine runs with, or the seed of nothing
    same = replace(base, engine="transformers", calls=3, gpu_memory_fraction=0.5, seed=7)
    assert keys.answer_fingerprint("a", same) == known


def test_other_sampling_is_another_answer() -> None:
    sampled = AnswerConfig(temperature=0.5)
    variants = [
        AnswerConfig(),
        sampled,
        replace(sampled, seed=1),
        replace(sampled, top_p=0.9),
        AnswerConfig(stop=["."]),
        AnswerConfig(stop=[".", "!"]),
        AnswerConfig(json_schema="{}"),
        AnswerConfig(quantization="fp8"),
        AnswerConfig(kv_cache_dtype="fp8"),
    ]
    assert len({keys.answer_fingerprint("a", variant) for variant in variants}) == len(variants)


def test_the_same_prompt_with_choices_has_another_id() -> None:
    ids = [keys.prompt_id("What?", choices) for choices in (None, ["a", "b"], ["b", "a"], ["ab"])]
    assert len(set(ids)) == 4
    assert keys.prompt_id("What?", []) == ids[0]


def test_run_ids_are_different() -> None:
    assert len({keys.new_run_id() for _ in range(100)}) == 100
