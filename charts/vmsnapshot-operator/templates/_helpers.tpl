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
