"""The importers by name."""

from nemo_mapo.data.importers import (
    audioset,
    audioskills,
    avqa,
    cochlscene,
    hf_folder,
    iemocap,
    libritts_r,
    multiple_choice,
    musiccaps,
    nemo_manifest,
    shar,
    tacos,
)
from nemo_mapo.data.importers.base import Importer

IMPORTERS: dict[str, Importer] = {
    importer.name: importer
    for importer in (
        avqa.IMPORTER,
        audioset.IMPORTER,
        tacos.IMPORTER,
        libritts_r.IMPORTER,
        iemocap.IMPORTER,
        musiccaps.IMPORTER,
        cochlscene.IMPORTER,
        audioskills.IMPORTER,
        multiple_choice.IMPORTER,
        hf_folder.IMPORTER,
        nemo_manifest.IMPORTER,
        shar.IMPORTER,
    )
}
