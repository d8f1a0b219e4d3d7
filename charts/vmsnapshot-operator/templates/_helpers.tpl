{{/* Name of every object of this release. */}}
{{- define "vmsnapshot.name" -}}
{{- .Values.nameOverride | default .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{/* Name of the ServiceAccount, ours or a given one. */}}
{{- define "vmsnapshot.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (include "vmsnapshot.name" .) -}}
{{- end -}}

{{/* What the pods are selected by: never changes between versions, since a Deployment's selector cannot. */}}
{{- define "vmsnapshot.selectorLabels" -}}
app.kubernetes.io/name: vmsnapshot-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "vmsnapshot.labels" -}}
{{ include "vmsnapshot.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The image: a digest is exact, so it wins over a tag. */}}
{{- define "vmsnapshot.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* Where the guardian listens; in a volume that both containers share. */}}
{{- define "vmsnapshot.guardianSocket" -}}
/run/vmsnapshot/guardian.sock
{{- end -}}

{{/* What the remote guardian's pods are selected by: another name, so that nothing takes them for the operator's. */}}
{{- define "vmsnapshot.guardianLabels" -}}
app.kubernetes.io/name: vmsnapshot-guardian
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Whether a counter grew within 15 minutes, also if it appeared with its first event: (list metric selector label). */}}
{{- define "vmsnapshot.grew" -}}
{{- $series := printf "%s{%s}" (index . 0) (index . 1) -}}
sum by ({{ index . 2 }}) (increase({{ $series }}[15m])) > 0 or sum by ({{ index . 2 }}) ({{ $series }} unless {{ $series }} offset 15m) > 0
{{- end -}}

{{/* Whether something took longer than a bucket within 15 minutes: (list histogram selector bucket). Half an event, since
Prometheus extrapolates the two series each for itself. */}}
{{- define "vmsnapshot.longer" -}}
{{- $all := printf "%s_count{%s}" (index . 0) (index . 1) -}}
{{- $short := printf "%s_bucket{%s,le=%q}" (index . 0) (index . 1) (index . 2) -}}
sum by (hypervisor) (increase({{ $all }}[15m])) - sum by (hypervisor) (increase({{ $short }}[15m])) > 0.5 or sum by (hypervisor) ({{ $all }} unless {{ $all }} offset 15m) - sum by (hypervisor) ({{ $short }} unless {{ $short }} offset 15m) > 0.5
{{- end -}}

{{/* The link to an alert's chapter: (list url anchor). */}}
{{- define "vmsnapshot.runbook" -}}
{{- with index . 0 -}}
runbook_url: {{ printf "%s#%s" . (index $ 1) | quote }}
{{- end -}}
{{- end -}}
