import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InferenceMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INFERENCE_MODE_UNSPECIFIED: _ClassVar[InferenceMode]
    INFERENCE_MODE_REMOTE: _ClassVar[InferenceMode]
    INFERENCE_MODE_LOCAL: _ClassVar[InferenceMode]

class StepStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_STATUS_UNSPECIFIED: _ClassVar[StepStatus]
    STEP_STATUS_RUNNING: _ClassVar[StepStatus]
    STEP_STATUS_TERMINATED: _ClassVar[StepStatus]
    STEP_STATUS_TRUNCATED: _ClassVar[StepStatus]
    STEP_STATUS_ABANDONED: _ClassVar[StepStatus]

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_BOOL: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]
    DATA_TYPE_UINT16: _ClassVar[DataType]
    DATA_TYPE_UINT32: _ClassVar[DataType]
    DATA_TYPE_INT8: _ClassVar[DataType]
    DATA_TYPE_INT16: _ClassVar[DataType]
    DATA_TYPE_INT32: _ClassVar[DataType]
    DATA_TYPE_INT64: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT64: _ClassVar[DataType]

class ErrorReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_REASON_UNSPECIFIED: _ClassVar[ErrorReason]
    ERROR_REASON_MALFORMED_TENSOR: _ClassVar[ErrorReason]
    ERROR_REASON_SPACE_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_NOT_FINITE: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_SESSION: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_EPISODE: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_POLICY: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_AGENT: _ClassVar[ErrorReason]
    ERROR_REASON_EPISODE_ENDED: _ClassVar[ErrorReason]
    ERROR_REASON_STEP_OUT_OF_ORDER: _ClassVar[ErrorReason]
    ERROR_REASON_STALE_POLICY: _ClassVar[ErrorReason]
    ERROR_REASON_POLICY_MISMATCH: _ClassVar[ErrorReason]
    ERROR_REASON_WRONG_MODE: _ClassVar[ErrorReason]
    ERROR_REASON_LIMIT_EXCEEDED: _ClassVar[ErrorReason]
    ERROR_REASON_NOT_READY: _ClassVar[ErrorReason]
    ERROR_REASON_DRAINING: _ClassVar[ErrorReason]
    ERROR_REASON_INCOMPATIBLE_PROTOCOL: _ClassVar[ErrorReason]
    ERROR_REASON_LOGP_REQUIRED: _ClassVar[ErrorReason]
    ERROR_REASON_NO_LOCAL_INFERENCE: _ClassVar[ErrorReason]
    ERROR_REASON_UNAUTHENTICATED: _ClassVar[ErrorReason]
    ERROR_REASON_UNKNOWN_ENVIRONMENT: _ClassVar[ErrorReason]
    ERROR_REASON_ENVIRONMENT_FAILED: _ClassVar[ErrorReason]
    ERROR_REASON_INTERNAL: _ClassVar[ErrorReason]
INFERENCE_MODE_UNSPECIFIED: InferenceMode
INFERENCE_MODE_REMOTE: InferenceMode
INFERENCE_MODE_LOCAL: InferenceMode
STEP_STATUS_UNSPECIFIED: StepStatus
STEP_STATUS_RUNNING: StepStatus
STEP_STATUS_TERMINATED: StepStatus
STEP_STATUS_TRUNCATED: StepStatus
STEP_STATUS_ABANDONED: StepStatus
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_BOOL: DataType
DATA_TYPE_UINT8: DataType
DATA_TYPE_UINT16: DataType
DATA_TYPE_UINT32: DataType
DATA_TYPE_INT8: DataType
DATA_TYPE_INT16: DataType
DATA_TYPE_INT32: DataType
DATA_TYPE_INT64: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT64: DataType
ERROR_REASON_UNSPECIFIED: ErrorReason
ERROR_REASON_MALFORMED_TENSOR: ErrorReason
ERROR_REASON_SPACE_MISMATCH: ErrorReason
ERROR_REASON_NOT_FINITE: ErrorReason
ERROR_REASON_UNKNOWN_SESSION: ErrorReason
ERROR_REASON_UNKNOWN_EPISODE: ErrorReason
ERROR_REASON_UNKNOWN_POLICY: ErrorReason
ERROR_REASON_UNKNOWN_AGENT: ErrorReason
ERROR_REASON_EPISODE_ENDED: ErrorReason
ERROR_REASON_STEP_OUT_OF_ORDER: ErrorReason
ERROR_REASON_STALE_POLICY: ErrorReason
ERROR_REASON_POLICY_MISMATCH: ErrorReason
ERROR_REASON_WRONG_MODE: ErrorReason
ERROR_REASON_LIMIT_EXCEEDED: ErrorReason
ERROR_REASON_NOT_READY: ErrorReason
ERROR_REASON_DRAINING: ErrorReason
ERROR_REASON_INCOMPATIBLE_PROTOCOL: ErrorReason
ERROR_REASON_LOGP_REQUIRED: ErrorReason
ERROR_REASON_NO_LOCAL_INFERENCE: ErrorReason
ERROR_REASON_UNAUTHENTICATED: ErrorReason
ERROR_REASON_UNKNOWN_ENVIRONMENT: ErrorReason
ERROR_REASON_ENVIRONMENT_FAILED: ErrorReason
ERROR_REASON_INTERNAL: ErrorReason

class OpenSessionRequest(_message.Message):
    __slots__ = ("client_name", "protocol_version", "inference_mode", "agents", "session_id")
    class AgentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: AgentSpec
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[AgentSpec, _Mapping]] = ...) -> None: ...
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_MODE_FIELD_NUMBER: _ClassVar[int]
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    client_name: str
    protocol_version: str
    inference_mode: InferenceMode
    agents: _containers.MessageMap[str, AgentSpec]
    session_id: str
    def __init__(self, client_name: _Optional[str] = ..., protocol_version: _Optional[str] = ..., inference_mode: _Optional[_Union[InferenceMode, str]] = ..., agents: _Optional[_Mapping[str, AgentSpec]] = ..., session_id: _Optional[str] = ...) -> None: ...

class OpenSessionResponse(_message.Message):
    __slots__ = ("session_id", "protocol_version", "agents", "lease", "limits", "policy_version", "redirect_address", "steps_per_upload", "client_config", "delivered_sequence", "holds")
    class AgentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: AgentSpec
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[AgentSpec, _Mapping]] = ...) -> None: ...
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    REDIRECT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_UPLOAD_FIELD_NUMBER: _ClassVar[int]
    CLIENT_CONFIG_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    protocol_version: str
    agents: _containers.MessageMap[str, AgentSpec]
    lease: _duration_pb2.Duration
    limits: Limits
    policy_version: int
    redirect_address: str
    steps_per_upload: int
    client_config: _struct_pb2.Struct
    delivered_sequence: int
    holds: bool
    def __init__(self, session_id: _Optional[str] = ..., protocol_version: _Optional[str] = ..., agents: _Optional[_Mapping[str, AgentSpec]] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., policy_version: _Optional[int] = ..., redirect_address: _Optional[str] = ..., steps_per_upload: _Optional[int] = ..., client_config: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., delivered_sequence: _Optional[int] = ..., holds: bool = ...) -> None: ...

class AgentSpec(_message.Message):
    __slots__ = ("observation_space", "action_space", "policy_id")
    OBSERVATION_SPACE_FIELD_NUMBER: _ClassVar[int]
    ACTION_SPACE_FIELD_NUMBER: _ClassVar[int]
    POLICY_ID_FIELD_NUMBER: _ClassVar[int]
    observation_space: Space
    action_space: Space
    policy_id: str
    def __init__(self, observation_space: _Optional[_Union[Space, _Mapping]] = ..., action_space: _Optional[_Union[Space, _Mapping]] = ..., policy_id: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_rows_per_request", "max_open_episodes", "max_message_bytes")
    MAX_ROWS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_OPEN_EPISODES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_rows_per_request: int
    max_open_episodes: int
    max_message_bytes: int
    def __init__(self, max_rows_per_request: _Optional[int] = ..., max_open_episodes: _Optional[int] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EpisodeStart(_message.Message):
    __slots__ = ("episode", "label", "evaluation", "greedy", "resumed")
    EPISODE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    GREEDY_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    episode: int
    label: str
    evaluation: bool
    greedy: bool
    resumed: bool
    def __init__(self, episode: _Optional[int] = ..., label: _Optional[str] = ..., evaluation: bool = ..., greedy: bool = ..., resumed: bool = ...) -> None: ...

class EpisodeMetrics(_message.Message):
    __slots__ = ("episode", "values")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    EPISODE_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    episode: int
    values: _containers.ScalarMap[str, float]
    def __init__(self, episode: _Optional[int] = ..., values: _Optional[_Mapping[str, float]] = ...) -> None: ...

class StepRows(_message.Message):
    __slots__ = ("episodes", "agents", "steps", "rewards", "statuses", "observations", "logged_actions", "logged_logps")
    EPISODES_FIELD_NUMBER: _ClassVar[int]
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    REWARDS_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    OBSERVATIONS_FIELD_NUMBER: _ClassVar[int]
    LOGGED_ACTIONS_FIELD_NUMBER: _ClassVar[int]
    LOGGED_LOGPS_FIELD_NUMBER: _ClassVar[int]
    episodes: _containers.RepeatedScalarFieldContainer[int]
    agents: _containers.RepeatedScalarFieldContainer[str]
    steps: _containers.RepeatedScalarFieldContainer[int]
    rewards: _containers.RepeatedScalarFieldContainer[float]
    statuses: _containers.RepeatedScalarFieldContainer[StepStatus]
    observations: Batch
    logged_actions: Batch
    logged_logps: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, episodes: _Optional[_Iterable[int]] = ..., agents: _Optional[_Iterable[str]] = ..., steps: _Optional[_Iterable[int]] = ..., rewards: _Optional[_Iterable[float]] = ..., statuses: _Optional[_Iterable[_Union[StepStatus, str]]] = ..., observations: _Optional[_Union[Batch, _Mapping]] = ..., logged_actions: _Optional[_Union[Batch, _Mapping]] = ..., logged_logps: _Optional[_Iterable[float]] = ...) -> None: ...

class ActionRows(_message.Message):
    __slots__ = ("actions", "policy_version", "faults")
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    actions: Batch
    policy_version: int
    faults: _containers.RepeatedCompositeFieldContainer[Fault]
    def __init__(self, actions: _Optional[_Union[Batch, _Mapping]] = ..., policy_version: _Optional[int] = ..., faults: _Optional[_Iterable[_Union[Fault, _Mapping]]] = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("index", "error")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    index: int
    error: ErrorDetail
    def __init__(self, index: _Optional[int] = ..., error: _Optional[_Union[ErrorDetail, _Mapping]] = ...) -> None: ...

class ActRequest(_message.Message):
    __slots__ = ("session_id", "starts", "groups", "metrics")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    starts: _containers.RepeatedCompositeFieldContainer[EpisodeStart]
    groups: _containers.RepeatedCompositeFieldContainer[StepRows]
    metrics: _containers.RepeatedCompositeFieldContainer[EpisodeMetrics]
    def __init__(self, session_id: _Optional[str] = ..., starts: _Optional[_Iterable[_Union[EpisodeStart, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[StepRows, _Mapping]]] = ..., metrics: _Optional[_Iterable[_Union[EpisodeMetrics, _Mapping]]] = ...) -> None: ...

class ActResponse(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[ActionRows]
    def __init__(self, groups: _Optional[_Iterable[_Union[ActionRows, _Mapping]]] = ...) -> None: ...

class StreamActRequest(_message.Message):
    __slots__ = ("request", "act")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ACT_FIELD_NUMBER: _ClassVar[int]
    request: int
    act: ActRequest
    def __init__(self, request: _Optional[int] = ..., act: _Optional[_Union[ActRequest, _Mapping]] = ...) -> None: ...

class StreamActResponse(_message.Message):
    __slots__ = ("request", "act", "error")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ACT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request: int
    act: ActResponse
    error: ErrorDetail
    def __init__(self, request: _Optional[int] = ..., act: _Optional[_Union[ActResponse, _Mapping]] = ..., error: _Optional[_Union[ErrorDetail, _Mapping]] = ...) -> None: ...

class GetPolicyRequest(_message.Message):
    __slots__ = ("session_id", "policy_id", "have_sha256", "wait")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_ID_FIELD_NUMBER: _ClassVar[int]
    HAVE_SHA256_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    policy_id: str
    have_sha256: bytes
    wait: _duration_pb2.Duration
    def __init__(self, session_id: _Optional[str] = ..., policy_id: _Optional[str] = ..., have_sha256: _Optional[bytes] = ..., wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class GetPolicyResponse(_message.Message):
    __slots__ = ("header", "piece")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    header: PolicyHeader
    piece: bytes
    def __init__(self, header: _Optional[_Union[PolicyHeader, _Mapping]] = ..., piece: _Optional[bytes] = ...) -> None: ...

class PolicyHeader(_message.Message):
    __slots__ = ("policy_id", "policy_version", "size_bytes", "sha256")
    POLICY_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    policy_id: str
    policy_version: int
    size_bytes: int
    sha256: bytes
    def __init__(self, policy_id: _Optional[str] = ..., policy_version: _Optional[int] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("sequence", "episode", "agent", "policy_id", "policy_version", "policy_sha256", "first_step", "observations", "actions", "rewards", "outputs", "status", "env_steps", "logged")
    class OutputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EPISODE_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    POLICY_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    POLICY_SHA256_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    OBSERVATIONS_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    REWARDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ENV_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOGGED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    episode: int
    agent: str
    policy_id: str
    policy_version: int
    policy_sha256: bytes
    first_step: int
    observations: Batch
    actions: Batch
    rewards: Tensor
    outputs: _containers.MessageMap[str, Tensor]
    status: StepStatus
    env_steps: _containers.RepeatedScalarFieldContainer[int]
    logged: bool
    def __init__(self, sequence: _Optional[int] = ..., episode: _Optional[int] = ..., agent: _Optional[str] = ..., policy_id: _Optional[str] = ..., policy_version: _Optional[int] = ..., policy_sha256: _Optional[bytes] = ..., first_step: _Optional[int] = ..., observations: _Optional[_Union[Batch, _Mapping]] = ..., actions: _Optional[_Union[Batch, _Mapping]] = ..., rewards: _Optional[_Union[Tensor, _Mapping]] = ..., outputs: _Optional[_Mapping[str, Tensor]] = ..., status: _Optional[_Union[StepStatus, str]] = ..., env_steps: _Optional[_Iterable[int]] = ..., logged: bool = ...) -> None: ...

class UploadEpisodesRequest(_message.Message):
    __slots__ = ("session_id", "starts", "chunks", "metrics")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    starts: _containers.RepeatedCompositeFieldContainer[EpisodeStart]
    chunks: _containers.RepeatedCompositeFieldContainer[Chunk]
    metrics: _containers.RepeatedCompositeFieldContainer[EpisodeMetrics]
    def __init__(self, session_id: _Optional[str] = ..., starts: _Optional[_Iterable[_Union[EpisodeStart, _Mapping]]] = ..., chunks: _Optional[_Iterable[_Union[Chunk, _Mapping]]] = ..., metrics: _Optional[_Iterable[_Union[EpisodeMetrics, _Mapping]]] = ...) -> None: ...

class UploadEpisodesResponse(_message.Message):
    __slots__ = ("accepted_sequence", "delivered_sequence", "policy_version", "faults")
    ACCEPTED_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    DELIVERED_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    accepted_sequence: int
    delivered_sequence: int
    policy_version: int
    faults: _containers.RepeatedCompositeFieldContainer[Fault]
    def __init__(self, accepted_sequence: _Optional[int] = ..., delivered_sequence: _Optional[int] = ..., policy_version: _Optional[int] = ..., faults: _Optional[_Iterable[_Union[Fault, _Mapping]]] = ...) -> None: ...

class MakeRequest(_message.Message):
    __slots__ = ("protocol_version", "env_id", "kwargs", "render_mode", "num_envs")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ENV_ID_FIELD_NUMBER: _ClassVar[int]
    KWARGS_FIELD_NUMBER: _ClassVar[int]
    RENDER_MODE_FIELD_NUMBER: _ClassVar[int]
    NUM_ENVS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: str
    env_id: str
    kwargs: _struct_pb2.Struct
    render_mode: str
    num_envs: int
    def __init__(self, protocol_version: _Optional[str] = ..., env_id: _Optional[str] = ..., kwargs: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., render_mode: _Optional[str] = ..., num_envs: _Optional[int] = ...) -> None: ...

class MakeResponse(_message.Message):
    __slots__ = ("env_handle", "observation_space", "action_space", "metadata", "protocol_version", "lease")
    ENV_HANDLE_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_SPACE_FIELD_NUMBER: _ClassVar[int]
    ACTION_SPACE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    env_handle: str
    observation_space: Space
    action_space: Space
    metadata: _struct_pb2.Struct
    protocol_version: str
    lease: _duration_pb2.Duration
    def __init__(self, env_handle: _Optional[str] = ..., observation_space: _Optional[_Union[Space, _Mapping]] = ..., action_space: _Optional[_Union[Space, _Mapping]] = ..., metadata: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., protocol_version: _Optional[str] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ResetRequest(_message.Message):
    __slots__ = ("env_handle", "seeds", "options")
    ENV_HANDLE_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    env_handle: str
    seeds: _containers.RepeatedScalarFieldContainer[int]
    options: _struct_pb2.Struct
    def __init__(self, env_handle: _Optional[str] = ..., seeds: _Optional[_Iterable[int]] = ..., options: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ...) -> None: ...

class ResetResponse(_message.Message):
    __slots__ = ("observations", "infos")
    OBSERVATIONS_FIELD_NUMBER: _ClassVar[int]
    INFOS_FIELD_NUMBER: _ClassVar[int]
    observations: Batch
    infos: _containers.RepeatedCompositeFieldContainer[_struct_pb2.Struct]
    def __init__(self, observations: _Optional[_Union[Batch, _Mapping]] = ..., infos: _Optional[_Iterable[_Union[_struct_pb2.Struct, _Mapping]]] = ...) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("env_handle", "actions")
    ENV_HANDLE_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    env_handle: str
    actions: Batch
    def __init__(self, env_handle: _Optional[str] = ..., actions: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...

class StepResponse(_message.Message):
    __slots__ = ("observations", "rewards", "terminated", "truncated", "infos")
    OBSERVATIONS_FIELD_NUMBER: _ClassVar[int]
    REWARDS_FIELD_NUMBER: _ClassVar[int]
    TERMINATED_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    INFOS_FIELD_NUMBER: _ClassVar[int]
    observations: Batch
    rewards: _containers.RepeatedScalarFieldContainer[float]
    terminated: _containers.RepeatedScalarFieldContainer[bool]
    truncated: _containers.RepeatedScalarFieldContainer[bool]
    infos: _containers.RepeatedCompositeFieldContainer[_struct_pb2.Struct]
    def __init__(self, observations: _Optional[_Union[Batch, _Mapping]] = ..., rewards: _Optional[_Iterable[float]] = ..., terminated: _Optional[_Iterable[bool]] = ..., truncated: _Optional[_Iterable[bool]] = ..., infos: _Optional[_Iterable[_Union[_struct_pb2.Struct, _Mapping]]] = ...) -> None: ...

class DriveRequest(_message.Message):
    __slots__ = ("reset", "step")
    RESET_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    reset: ResetRequest
    step: StepRequest
    def __init__(self, reset: _Optional[_Union[ResetRequest, _Mapping]] = ..., step: _Optional[_Union[StepRequest, _Mapping]] = ...) -> None: ...

class DriveResponse(_message.Message):
    __slots__ = ("reset", "step", "error")
    RESET_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    reset: ResetResponse
    step: StepResponse
    error: ErrorDetail
    def __init__(self, reset: _Optional[_Union[ResetResponse, _Mapping]] = ..., step: _Optional[_Union[StepResponse, _Mapping]] = ..., error: _Optional[_Union[ErrorDetail, _Mapping]] = ...) -> None: ...

class RenderRequest(_message.Message):
    __slots__ = ("env_handle", "env_index")
    ENV_HANDLE_FIELD_NUMBER: _ClassVar[int]
    ENV_INDEX_FIELD_NUMBER: _ClassVar[int]
    env_handle: str
    env_index: int
    def __init__(self, env_handle: _Optional[str] = ..., env_index: _Optional[int] = ...) -> None: ...

class RenderResponse(_message.Message):
    __slots__ = ("frame",)
    FRAME_FIELD_NUMBER: _ClassVar[int]
    frame: Tensor
    def __init__(self, frame: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class StreamFramesRequest(_message.Message):
    __slots__ = ("env_handle", "env_index", "max_frames_per_second")
    ENV_HANDLE_FIELD_NUMBER: _ClassVar[int]
    ENV_INDEX_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAMES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    env_handle: str
    env_index: int
    max_frames_per_second: float
    def __init__(self, env_handle: _Optional[str] = ..., env_index: _Optional[int] = ..., max_frames_per_second: _Optional[float] = ...) -> None: ...

class StreamFramesResponse(_message.Message):
    __slots__ = ("frame",)
    FRAME_FIELD_NUMBER: _ClassVar[int]
    frame: Tensor
    def __init__(self, frame: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("env_handle",)
    ENV_HANDLE_FIELD_NUMBER: _ClassVar[int]
    env_handle: str
    def __init__(self, env_handle: _Optional[str] = ...) -> None: ...

class CloseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("leaves",)
    class LeavesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    leaves: _containers.MessageMap[str, Tensor]
    def __init__(self, leaves: _Optional[_Mapping[str, Tensor]] = ...) -> None: ...

class Space(_message.Message):
    __slots__ = ("box", "discrete", "multi_discrete", "multi_binary", "dict", "tuple", "text")
    BOX_FIELD_NUMBER: _ClassVar[int]
    DISCRETE_FIELD_NUMBER: _ClassVar[int]
    MULTI_DISCRETE_FIELD_NUMBER: _ClassVar[int]
    MULTI_BINARY_FIELD_NUMBER: _ClassVar[int]
    DICT_FIELD_NUMBER: _ClassVar[int]
    TUPLE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    box: BoxSpace
    discrete: DiscreteSpace
    multi_discrete: MultiDiscreteSpace
    multi_binary: MultiBinarySpace
    dict: DictSpace
    tuple: TupleSpace
    text: TextSpace
    def __init__(self, box: _Optional[_Union[BoxSpace, _Mapping]] = ..., discrete: _Optional[_Union[DiscreteSpace, _Mapping]] = ..., multi_discrete: _Optional[_Union[MultiDiscreteSpace, _Mapping]] = ..., multi_binary: _Optional[_Union[MultiBinarySpace, _Mapping]] = ..., dict: _Optional[_Union[DictSpace, _Mapping]] = ..., tuple: _Optional[_Union[TupleSpace, _Mapping]] = ..., text: _Optional[_Union[TextSpace, _Mapping]] = ...) -> None: ...

class BoxSpace(_message.Message):
    __slots__ = ("dtype", "shape", "low", "high")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    low: Tensor
    high: Tensor
    def __init__(self, dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., low: _Optional[_Union[Tensor, _Mapping]] = ..., high: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class DiscreteSpace(_message.Message):
    __slots__ = ("n", "start")
    N_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    n: int
    start: int
    def __init__(self, n: _Optional[int] = ..., start: _Optional[int] = ...) -> None: ...

class MultiDiscreteSpace(_message.Message):
    __slots__ = ("nvec", "start")
    NVEC_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    nvec: Tensor
    start: Tensor
    def __init__(self, nvec: _Optional[_Union[Tensor, _Mapping]] = ..., start: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class MultiBinarySpace(_message.Message):
    __slots__ = ("shape",)
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, shape: _Optional[_Iterable[int]] = ...) -> None: ...

class DictSpace(_message.Message):
    __slots__ = ("spaces",)
    class SpacesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Space
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Space, _Mapping]] = ...) -> None: ...
    SPACES_FIELD_NUMBER: _ClassVar[int]
    spaces: _containers.MessageMap[str, Space]
    def __init__(self, spaces: _Optional[_Mapping[str, Space]] = ...) -> None: ...

class TupleSpace(_message.Message):
    __slots__ = ("spaces",)
    SPACES_FIELD_NUMBER: _ClassVar[int]
    spaces: _containers.RepeatedCompositeFieldContainer[Space]
    def __init__(self, spaces: _Optional[_Iterable[_Union[Space, _Mapping]]] = ...) -> None: ...

class TextSpace(_message.Message):
    __slots__ = ("min_length", "max_length", "charset")
    MIN_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    CHARSET_FIELD_NUMBER: _ClassVar[int]
    min_length: int
    max_length: int
    charset: str
    def __init__(self, min_length: _Optional[int] = ..., max_length: _Optional[int] = ..., charset: _Optional[str] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("reason", "field", "message", "retry_after", "status_code")
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    STATUS_CODE_FIELD_NUMBER: _ClassVar[int]
    reason: ErrorReason
    field: str
    message: str
    retry_after: _duration_pb2.Duration
    status_code: int
    def __init__(self, reason: _Optional[_Union[ErrorReason, str]] = ..., field: _Optional[str] = ..., message: _Optional[str] = ..., retry_after: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., status_code: _Optional[int] = ...) -> None: ...
