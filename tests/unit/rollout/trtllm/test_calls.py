"""Our sampling in TensorRT-LLM's words."""

import torch

from nemo_mapo.config.run import SamplingConfig
from nemo_mapo.rollout.trtllm.calls import NO_TOKEN, engine_sampling, word_list


def test_words_of_one_token_end_one_after_the_other():
    words = word_list([5, 9, 2], batch=2)
    assert words.tolist() == [[[5, 9, 2], [1, 2, 3]]] * 2
    assert words.dtype == "int32"


def test_no_words_are_an_empty_list_for_every_row():
    assert word_list([], batch=3).shape == (3, 2, 0)


def test_sampling_options_keep_their_values_and_each_row_its_seed():
    sampling = SamplingConfig(temperature=1.2, top_k=50, top_p=0.99, max_new_tokens=30)
    said = engine_sampling(sampling, seeds=torch.tensor([2**50 + 1, 4]), stop_ids=[1], forbidden_ids=[0, 3])
    assert (said.temperature, said.top_k, said.top_p, said.max_new_tokens) == (1.2, 50, 0.99, 30)
    assert said.random_seed.tolist() == [2**50 + 1, 4]
    assert said.stop_words_list.tolist() == [[[1], [1]]] * 2
    assert said.bad_words_list.tolist() == [[[0, 3], [1, 2]]] * 2
    assert (said.end_id, said.pad_id) == (NO_TOKEN, NO_TOKEN)
    assert said.output_log_probs and said.output_sequence_lengths and said.return_dict


def test_temperature_0_is_top_k_1():
    sampling = SamplingConfig(temperature=0, top_k=50, top_p=0.5, max_new_tokens=3)
    said = engine_sampling(sampling, seeds=torch.tensor([1]), stop_ids=[1], forbidden_ids=[])
    assert (said.temperature, said.top_k, said.top_p) == (1.0, 1, 1.0)
