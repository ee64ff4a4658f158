"""NAL units of H.264 (ITU-T H.264): which packets no other picture depends on, told without decoding."""

from av.packet import Packet
from av.video.stream import VideoStream

_SLICE, _DELIMITER, _FILLER = 1, 9, 12  # types of units (table 7-1)


def is_unreferenced(packet: "Packet[VideoStream]", header: bytes) -> bool:
    """Whether nothing but slices of nal_ref_idc 0 is in it: no picture, nor any parameter, depends on it (7.4.1)."""
    if packet.is_keyframe or packet.has_sidedata("new_extradata"):
        return False
    units = _unit_headers(bytes(packet), header)
    kinds = {unit & 31 for unit in units}
    return _SLICE in kinds and kinds <= {_SLICE, _DELIMITER, _FILLER} and not any(unit & 0x60 for unit in units)


def _unit_headers(data: bytes, header: bytes) -> list[int]:
    """The first byte of each NAL unit; none where they do not fill the packet.

    Units follow their lengths in files that have an avcC header (ISO/IEC 14496-15), start codes elsewhere.
    """
    if header[:1] != b"\1":
        starts = data.startswith((b"\0\0\1", b"\0\0\0\1"))
        return [unit[0] for unit in data.split(b"\0\0\1")[1:] if unit] if starts else []
    units, position = [], 0
    width = (header[4] & 3) + 1 if len(header) > 4 else 4
    while position + width < len(data):
        units.append(data[position + width])
        position += width + int.from_bytes(data[position : position + width])
    return units if position == len(data) else []
